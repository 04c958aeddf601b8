"""Keeping a host within its memory: which banks leave it so that another, or what one was, has room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, NamedTuple

from raymem.bank.primary import Executor
from raymem.errors import RaymemError, TooLarge
from raymem.logs import get_logger
from raymem.storage.store import ColdStore, Entry

log = get_logger("raymem.host.memory_budget")
# what banks were, all of it together: it takes memory beside the banks, and no bank can have this name
PAST = "the past"


class MemoryLimit(NamedTuple):
    """A limit in bytes, None for none, with the names of its owner and of the setting that says so, for errors."""

    owner: str
    nbytes: int | None
    setting: str

    def is_short(self, loaded: Mapping[str, int]) -> bool:
        """Whether the banks that are loaded take more than they may."""
        return self.nbytes is not None and sum(loaded.values()) > self.nbytes

    def leaving(self, name: str, needed: int, loaded: Mapping[str, int], pinned: Collection[str]) -> list[str]:
        """The banks to free so that one that takes `needed` bytes has room: the first that are loaded, as few as do.

        Args:
            name: the bank that needs it, or PAST.
            needed: all of its bytes, also those that it has already.
            loaded: bytes of each bank in memory, least recently used first.
            pinned: banks that stay.

        Raises:
            TooLarge: it would not fit if all others left that may.
        """
        if self.nbytes is None:
            return []
        others = {other: size for other, size in loaded.items() if other != name}
        kept = sum(size for other, size in others.items() if other in pinned)
        if needed + kept > self.nbytes:
            what = "a bank as it was" if name == PAST else f"bank {name!r}"
            raise TooLarge(
                f"{what} takes {needed} bytes, and {self.owner} may hold {self.nbytes}, {kept} of them in pinned banks "
                f"or in this one: raise {self.setting}, unpin a bank there, or move this one where there is more room",
                needed=needed,
                limit=self.nbytes,
            )
        free = self.nbytes - sum(others.values())
        leaving = []
        for other, size in others.items():
            if free >= needed:
                break
            if other not in pinned:
                leaving.append(other)
                free += size
        return leaving


class MemoryBudget:
    """The memory that a host's banks share, and what frees it. It remembers no bank: `held` says who is there.

    Args:
        cold: the store.
        limit: what may be held.
        executor: the host's threads.
        held: bytes of everything in memory now, least recently used first, by the name under which `evict` frees it.
        evict: frees one of them; says whether it did.
    """

    def __init__(
        self,
        cold: ColdStore,
        limit: MemoryLimit,
        executor: Executor,
        held: Callable[[], Mapping[str, int]],
        evict: Callable[[str], Awaitable[bool]],
    ) -> None:
        self.limit = limit
        self._evicted = 0
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
        if self.limit.nbytes is None:
            return 0
        freed = 0
        async with self._making:
            pinned = await self._executor.run(self._pinned)
            for other in self.limit.leaving(name, needed, self._held(), pinned | {stays}):
                if await self._evict(other):
                    freed += 1
                    self._evicted += other != PAST
        return freed

    async def admit(self, entry: Entry) -> None:
        """Make room for a bank before it is loaded.

        Raises:
            TooLarge: there is none.
        """
        if self.limit.nbytes is not None:
            await self.make(entry.name, await self._executor.run(self._size, entry))

    def watch(self, name: str) -> None:
        """A bank may have grown: free others, in the background, if all of them are too many now."""
        # adding up what many banks hold takes time
        if self.limit.nbytes is None or not self.limit.is_short(self._held()):
            return
        if self._growing is None or self._growing.done():
            self._growing = asyncio.create_task(self._keep(name))

    async def rest(self) -> None:
        """Wait for what `watch` began."""
        if self._growing is not None:
            await self._growing

    async def stats(self) -> dict[str, Any]:
        """What is in memory, what stays there, and how often a bank had to leave."""
        held, pinned = self._held(), await self._executor.run(self._pinned)
        return {
            "limit_bytes": self.limit.nbytes,
            "bytes": sum(held.values()),
            "past_bytes": held.get(PAST, 0),
            "pinned_bytes": sum(size for name, size in held.items() if name in pinned),
            "evicted": self._evicted,
        }

    async def _keep(self, name: str) -> None:
        try:
            # others may grow meanwhile
            while await self.make(name, self._held().get(name, 0)) and self.limit.is_short(self._held()):
                continue
        except RaymemError as error:
            # its next write hears why
            log.warning("no room made", bank=name, error=str(error))

    def _pinned(self) -> set[str]:
        return {entry.name for entry in self._cold.catalog.list() if entry.pinned}

    def _size(self, entry: Entry) -> int:
        """About how many bytes a bank takes in memory, before it is loaded."""
        known = self._cold.snapshots(entry).nbytes() or self._cold.journal(entry).stats()["bytes"]
        return min(entry.spec.budget_bytes, known)
