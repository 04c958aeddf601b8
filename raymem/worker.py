"""One hot bank's queue: writers are gathered into groups, everything that changes the bank runs in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from torch import Tensor

from raymem.config import Settings
from raymem.errors import Moved, NotOwner, RaymemError
from raymem.runtime import Runtime
from raymem.types import Ack, Readout, Trace

T = TypeVar("T")
log = structlog.get_logger("raymem.worker")


@dataclass(frozen=True)
class _Write:
    trace: Trace
    done: asyncio.Future[Ack]


@dataclass(frozen=True)
class _Call:
    function: Callable[[], Any]
    done: asyncio.Future[Any]


class BankWorker:
    """Runs one bank's runtime on a thread pool.

    Writes that arrive while a commit is under way go into the next commit together: the group grows with the load and
    a lone writer waits for nobody.
    """

    def __init__(self, runtime: Runtime, pool: ThreadPoolExecutor, settings: Settings) -> None:
        self.runtime = runtime
        self.lost = False
        self.upkeep_errors = 0
        self._pool = pool
        self._settings = settings
        self._queue: deque[_Write | _Call] = deque()
        self._wake = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._loop(), name=f"bank {runtime.entry.name}")

    @property
    def queued(self) -> int:
        """Writes and calls waiting."""
        return len(self._queue)

    async def write(self, trace: Trace) -> Ack:
        """Queue a trace; return its Ack once the group it went into is committed and applied."""
        done: asyncio.Future[Ack] = asyncio.get_running_loop().create_future()
        self._put(_Write(trace, done))
        return await done

    async def read(self, hidden_QLD: Tensor, k: int, start: int) -> Readout:
        """Read now, beside the writers."""
        return await self._in_thread(lambda: self.runtime.read(hidden_QLD, k, start))

    async def beside(self, function: Callable[[], T]) -> T:
        """Run `function` now, beside the writers."""
        return await self._in_thread(function)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` after the writes queued so far and before later ones."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(_Call(function, done))
        return await done

    async def close(self) -> None:
        """Finish what is queued, then stop."""
        await self.call(lambda: None)
        self._task.cancel()

    def give_up(self) -> None:
        """Stop at once: another owner may have the bank; what is queued hears so."""
        self.lost = True
        self._wake.set()

    def _put(self, item: _Write | _Call) -> None:
        if self.lost:
            _settle(item.done, self._reopening())
            return
        self._queue.append(item)
        self._wake.set()

    async def _loop(self) -> None:
        while not self.lost:
            await self._wake.wait()
            self._wake.clear()
            while self._queue and not self.lost:
                group = self._next_group()
                if group:
                    await self._commit(group)
                else:
                    await self._run(self._queue.popleft())
        # a lost runtime no longer knows where its journal ends: nothing more may be written through it
        while self._queue:
            _settle(self._queue.popleft().done, self._reopening())

    def _reopening(self) -> Moved:
        return Moved(f"bank {self.runtime.entry.name!r} is being reopened", to="")

    def _next_group(self) -> list[_Write]:
        group: list[_Write] = []
        size = 0
        while self._queue and isinstance(self._queue[0], _Write) and size < self._settings.host.group_bytes:
            item = self._queue.popleft()
            assert isinstance(item, _Write)
            size += item.trace.nbytes
            group.append(item)
        return group

    async def _commit(self, group: list[_Write]) -> None:
        traces = [item.trace for item in group]
        outcomes: list[Ack | RaymemError]
        try:
            outcomes = await self._in_thread(lambda: self.runtime.write(traces))
        except Exception as error:  # noqa: BLE001 - handed to every writer of the group, none is acknowledged
            # the journal may be ahead of the state now: only a fresh runtime, replayed from it, is sound
            self.lost = True
            log.error("bank lost", bank=self.runtime.entry.name, error=repr(error))
            outcomes = [RaymemError(f"bank {self.runtime.entry.name} failed and will be reopened: {error!r}")] * len(
                group
            )
        for item, outcome in zip(group, outcomes, strict=True):
            self.lost |= isinstance(outcome, NotOwner)
            _settle(item.done, outcome)
        await self._upkeep()

    async def _upkeep(self) -> None:
        # after the acknowledgements: rows are durable already, so a failure here costs time and no data
        try:
            await self._in_thread(self._maintain)
        except RaymemError as error:
            self.upkeep_errors += 1
            log.warning("upkeep failed", bank=self.runtime.entry.name, error=str(error))

    def _maintain(self) -> None:
        self.runtime.journal.maintain()
        # a snapshot each time the tail has grown as large as the state: in all, at most twice the bytes are written
        if self.runtime.unsaved_bytes >= max(self._settings.cold.snapshot_bytes, self.runtime.nbytes):
            self.runtime.snapshot()

    async def _run(self, item: _Write | _Call) -> None:
        assert isinstance(item, _Call)
        try:
            _settle(item.done, await self._in_thread(item.function))
        except Exception as error:  # noqa: BLE001 - handed to the caller
            _settle(item.done, error)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


def _settle(done: asyncio.Future[Any], outcome: Any) -> None:
    # a caller that went away does not stop the group
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
