"""Where streams of partitioned banks live, as far as writers here have asked; the table of partitions is the truth."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from raymem.host.ownership import Locks
from raymem.storage.catalog import part_name
from raymem.storage.partitions import Layout, Partitions

_MOST = 2**16


class Assignments:
    """The parts that streams live in, by bank and stream; a part that refuses a stream has it looked up again.

    Args:
        partitions: the table of partitions.
    """

    def __init__(self, partitions: Partitions) -> None:
        self._partitions = partitions
        self._known: dict[tuple[str, str], int] = {}
        self._asked: defaultdict[str, set[str]] = defaultdict(set)
        self._asking = Locks(asyncio.Lock)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._known

    async def part_of(self, layout: Layout, stream: str) -> str:
        """The part that a stream lives in, from now on if it lives nowhere."""
        key = layout.id, stream
        if key not in self._known:
            self._asked[layout.id].add(stream)
            # those that come while one asks are asked about together
            async with self._asking[layout.id]:
                if key not in self._known:
                    streams = self._asked.pop(layout.id, set()) | {stream}
                    found = await asyncio.to_thread(self._partitions.assign, layout, streams)
                    if len(self._known) >= _MOST:
                        self._known.clear()
                    self._known |= {(layout.id, each): place.home for each, place in found.items()}
        return part_name(layout.name, self._known[key])

    async def look_again(self, layout: Layout, stream: str, *, cancel: bool) -> None:
        """Ask for a stream again at its next write; with `cancel`, have it stay at home if a mover still holds it."""
        self._known.pop((layout.id, stream), None)
        place = await asyncio.to_thread(self._partitions.find, layout.id, stream)
        if place is not None and place.held and cancel:
            await asyncio.to_thread(self._partitions.cancel, layout, stream)
