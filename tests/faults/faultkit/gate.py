"""Work that can be asked to stand still, so that what is there can be compared with what was acknowledged."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from faultkit.ledger import Checker, Ledger

Digests = Callable[[], Awaitable[dict[str, str | None]]]


class Gate:
    """Lets pieces of work begin, unless somebody compares."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._inside = 0

    @asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """One piece of work, from its beginning to the end."""
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def closed(self, seconds: float) -> AsyncIterator[bool]:
        """Let nothing begin; says whether what had begun ended within so many seconds."""
        self._open.clear()
        try:
            async with asyncio.timeout(seconds) as patience:
                while self._inside:
                    await asyncio.sleep(0.005)
                patience.reschedule(None)
                yield True
        except TimeoutError:
            yield False
        finally:
            self._open.set()


async def compare(gate: Gate, checker: Checker, ledger: Ledger, digests: Digests, after: str, seconds: float) -> None:
    """Compare rows and states while nobody writes; the ledger hears of what is wrong."""
    async with gate.closed(seconds) as idle:
        if not idle:
            ledger.wrong.append(f"after {after}: a writer or the operator was not served within {seconds:g} s")
            return
        while True:
            before = await digests()
            verdict = await asyncio.to_thread(checker.compare, before)
            # a commit that nobody waits for any more may have come late
            if ledger.wrong or await digests() == before:
                break
    if verdict.lost or verdict.doubled or verdict.wrong:
        ledger.wrong.append(f"after {after}: {verdict.lost} lost, {verdict.doubled} doubled, {verdict.wrong[:3]}")
