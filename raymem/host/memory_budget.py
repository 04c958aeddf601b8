"""Keeping a host within its memory: who has to leave so that a bank, or what one was, fits in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from raymem.errors import RaymemError
from raymem.executor import Executor
from raymem.host.budget import PAST, LruLimit
from raymem.logs import get_logger
from raymem.storage.store import ColdStore, Entry

log = get_logger("raymem.host.memory_budget")


class MemoryBudget:
    """The memory that a host's banks share, and what frees it.

    Args:
        cold: the store.
        room: the limit, and who was used last.
        crew: the host's threads.
        held: bytes of everything in memory now, by the name under which `evict` frees it.
        evict: frees one of them; says whether it did.
    """

    def __init__(
        self,
        cold: ColdStore,
        room: LruLimit,
        executor: Executor,
        held: Callable[[], Mapping[str, int]],
        evict: Callable[[str], Awaitable[bool]],
    ) -> None:
        self.room = room
        self._cold = cold
        self._executor = executor
        self._held = held
        self._evict = evict
        self._making = asyncio.Lock()
        self._growing: asyncio.Task[None] | None = None

    async def make(self, name: str, needed: int, *, stays: str = "") -> int:
        """Free what was not used for longest, so that `name` has room for `needed` bytes; return how many left.

        Args:
            name: the bank that needs it, or PAST.
            needed: all of its bytes, also those that it has already.
            stays: another bank that is in use.

        Raises:
            TooLarge: even so there would be none.
        """
        if self.room.limit is None:
            return 0
        async with self._making:
            pinned = await self._executor.run(self._pinned)
            leaving = self.room.leaving(name, needed, self._held(), pinned | {stays})
            return sum([await self._free(other) for other in leaving])

    def check(self, name: str, needed: Callable[[], int]) -> None:
        """Raise TooLarge if a bank of so many bytes is too large even alone."""
        if self.room.limit is not None:
            self.room.leaving(name, needed(), {}, ())

    async def admit(self, entry: Entry) -> None:
        """Make room for a bank before it is loaded.

        Raises:
            TooLarge: there is none.
        """
        if self.room.limit is not None:
            await self.make(entry.name, await self._executor.run(lambda: self.size(entry)))

    def watch(self, name: str) -> None:
        """A bank may have grown: free others, in the background, if all of them are too many now."""
        # adding up what many banks hold takes time
        if self.room.limit is None:
            return
        if self.room.is_short(self._held()) and (self._growing is None or self._growing.done()):
            self._growing = asyncio.create_task(self._keep(name))

    async def rest(self) -> None:
        """Wait for what `watch` began."""
        if self._growing is not None:
            await self._growing

    async def stats(self) -> dict[str, Any]:
        """What is in memory, what stays there, and how often a bank had to leave."""
        held, pinned = self._held(), await self._executor.run(self._pinned)
        return {
            "limit_bytes": self.room.limit,
            "bytes": sum(held.values()),
            "past_bytes": held.get(PAST, 0),
            "pinned_bytes": sum(size for name, size in held.items() if name in pinned),
            "evicted": self.room.evicted,
        }

    def size(self, entry: Entry) -> int:
        """About how many bytes a bank takes in memory, before it is loaded."""
        known = self._cold.snapshots(entry).nbytes() or self._cold.journal(entry).stats()["bytes"]
        return min(entry.spec.budget_bytes, known)

    async def _free(self, name: str) -> bool:
        freed = await self._evict(name)
        if freed:
            self.room.forget(name)
            self.room.evicted += name != PAST
        return freed

    async def _keep(self, name: str) -> None:
        try:
            # others may grow meanwhile
            while await self.make(name, self._held().get(name, 0)) and self.room.is_short(self._held()):
                continue
        except RaymemError as error:
            # its next write hears why
            log.warning("no room made", bank=name, error=str(error))

    def _pinned(self) -> set[str]:
        return {entry.name for entry in self._cold.catalog.list() if entry.pinned}
