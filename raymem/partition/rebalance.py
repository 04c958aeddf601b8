"""Moving whole streams between the partitions of a bank, while it is read and written.

The steps of one stream; a mover may die after each, and the next rebalancing goes on from there:

1. its target is put down; the target's owner copies its rows from the journal of its home, as they are there
2. its writes are held: put down first, then its home's owner finishes those that wait and looks before later ones
3. the rest is copied
4. the target is its home, by compare-and-swap; writers and readers that knew the old one look again
5. its rows are erased where they were, which is put down last

Until 4 its home has every acknowledged row, from then on the target; a read asks all partitions, counts a row once, and
asks again if a home changed meanwhile.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence

from raymem.errors import BankDetached, RaymemError
from raymem.host.backend import Hosts
from raymem.logs import get_logger
from raymem.storage.history import require_no_past
from raymem.storage.partitions import Layout, Place
from raymem.types import RebalanceReport, Selection

log = get_logger("raymem.partition.rebalance")


def plan(held: Sequence[Mapping[str, int]], slack: float = 0.1) -> list[tuple[str, int]]:
    """Which streams go to which partition, so that none has much more than its share of the rows.

    Args:
        held: of each partition its streams and their rows.
        slack: what a partition may have over its share, of it.
    """
    streams = [dict(each) for each in held]
    loads = [sum(each.values()) for each in streams]
    enough, moves = (1 + slack) * sum(loads) / len(loads), list[tuple[str, int]]()
    while (step := _step(streams, loads, enough)) is not None:
        stream, home, target = step
        rows = streams[home].pop(stream)
        streams[target][stream] = rows
        loads[home] -= rows
        loads[target] += rows
        moves.append((stream, target))
    return moves


def _step(streams: list[dict[str, int]], loads: list[int], enough: float) -> tuple[str, int, int] | None:
    """From the fullest partition that can give one away to the emptiest: the stream that makes them most alike."""
    target = loads.index(min(loads))
    for home in sorted(range(len(loads)), key=lambda index: -loads[index]):
        gap = loads[home] - loads[target]
        fitting = {stream: rows for stream, rows in streams[home].items() if rows < gap}
        if loads[home] > enough and fitting:
            return min(fitting, key=lambda stream: (abs(gap - 2 * fitting[stream]), stream)), home, target
    return None


class Mover:
    """Evens out the partitions of one bank.

    Args:
        hosts: the hosts of its partitions.
        layout: of the bank.
    """

    def __init__(self, hosts: Hosts, layout: Layout) -> None:
        self._hosts = hosts
        self._layout = layout
        self._partitions = hosts.cold.partitions
        self._moved: list[int] = []
        self._pauses = [0.0]
        self._failed: dict[str, str] = {}

    async def run(self) -> RebalanceReport:
        """Finish what was cut short, then move what evens the partitions out.

        Raises:
            Conflict: tags or forks read rows where they are, or it is a fork. BankDetached: a partition is cold.
        """
        began = time.perf_counter()
        await asyncio.to_thread(require_no_past, self._hosts.cold, self._layout)
        held = await asyncio.to_thread(self._streams)
        every = {stream for streams in held for stream in streams}
        unfinished = await asyncio.to_thread(self._partitions.unfinished, self._layout, every)
        for stream in unfinished:
            await self._see_to(stream, None)
        for stream, target in plan(await asyncio.to_thread(self._streams) if unfinished else held):
            await self._see_to(stream, target)
        return RebalanceReport(
            self._layout.name,
            streams=len(self._moved),
            rows=sum(self._moved),
            pause_ms=max(self._pauses),
            total_ms=1e3 * (time.perf_counter() - began),
            failed=self._failed,
        )

    async def _see_to(self, stream: str, target: int | None) -> None:
        place = await asyncio.to_thread(self._partitions.find, self._layout.id, stream)
        if place is None or stream in self._failed:
            return
        try:
            place = await self._clear(stream, place)
            target = place.target if target is None else target
            if target not in (None, place.home):
                await self._move(stream, place, target)
        except BankDetached:
            raise
        except RaymemError as error:
            log.warning("stream not moved", bank=self._layout.name, error=str(error))
            self._failed[stream] = error.message
            await asyncio.to_thread(self._partitions.cancel, self._layout, stream)

    async def _move(self, stream: str, place: Place, target: int) -> None:
        place = await self._put(stream, place, dataclasses.replace(place, target=target))
        # a tag or fork made in between is seen here, and a later one sees the target
        await asyncio.to_thread(require_no_past, self._hosts.cold, self._layout)
        home, away = self._layout.parts[place.home], self._layout.parts[target]
        copied, seen = await self._hosts.ask(away, "pull", home, stream, 0)
        began = time.perf_counter()
        place = await self._put(stream, place, dataclasses.replace(place, held=True))
        await self._hosts.ask(home, "release", stream)
        rest, _ = await self._hosts.ask(away, "pull", home, stream, seen)
        place = await self._put(stream, place, Place(target, stale=place.home))
        self._pauses.append(1e3 * (time.perf_counter() - began))
        self._moved.append(copied + rest)
        await self._clear(stream, place)

    async def _clear(self, stream: str, place: Place) -> Place:
        if place.stale is None:
            return place
        await self._hosts.erase_part(self._layout.parts[place.stale], Selection(stream=stream), False)
        return await self._put(stream, place, dataclasses.replace(place, stale=None))

    async def _put(self, stream: str, before: Place, after: Place) -> Place:
        return await asyncio.to_thread(self._partitions.change, self._layout, stream, before, after)

    def _streams(self) -> list[dict[str, int]]:
        cold = self._hosts.cold
        return [cold.journal(cold.catalog.get(part)).streams() for part in self._layout.parts]
