"""What a partition's owner knows of the streams that it may take rows of."""

from __future__ import annotations

import asyncio

from raymem.errors import Reassigned
from raymem.storage.catalog import part_of
from raymem.storage.partitions import Place
from raymem.storage.store import ColdStore

_MOST = 2**16


class AssignmentCache:
    """The streams that live in one partition, as far as they were asked for while its present worker lives.

    The table of partitions is the truth. A stream is looked up at its first write, and again once it was released:
    a mover changes the table first, and then releases the stream here.
    """

    def __init__(self, cold: ColdStore, name: str) -> None:
        self._cold = cold
        self._name = name
        self._part = part_of(name)
        self._mine: set[str] = set()
        self._released = 0
        self._bank: str | None = None

    async def require(self, stream: str) -> None:
        """Raise Reassigned unless the stream lives here; in a bank that is no partition all do.

        When this returns nothing has been released since the table was asked.
        """
        if self._part is None:
            return
        while stream not in self._mine:
            released = self._released
            place = await asyncio.to_thread(self._look, stream, self._part[0])
            if place is None or place.home != self._part[1] or place.held:
                raise Reassigned(f"stream {stream!r} does not live in {self._name}, or is just leaving it; ask again")
            if released == self._released:
                if len(self._mine) >= _MOST:
                    self._mine.clear()
                self._mine.add(stream)

    async def expect(self, stream: str) -> None:
        """Raise Reassigned unless the stream is on its way here; as `require`."""
        released = -1
        while released != self._released and self._part is not None:
            released = self._released
            place = await asyncio.to_thread(self._look, stream, self._part[0])
            if place is None or place.target != self._part[1]:
                raise Reassigned(f"stream {stream!r} is not on its way to {self._name} any more")

    def release(self, stream: str | None) -> None:
        """Look a stream up again before its next write, or all."""
        self._released += 1
        self._mine = set() if stream is None else self._mine - {stream}

    def _look(self, stream: str, bank: str) -> Place | None:
        if self._bank is None:
            self._bank = self._cold.catalog.get(bank).id
        return self._cold.partitions.find(self._bank, stream)
