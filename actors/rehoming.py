"""Banks of owners that are gone find a new one, without anybody asking for them.

The lease alone decides that an owner is gone: of a node that left, of a shard that is alive and silent, and of one cut
off from here. Taking a bank over is a compare-and-swap in the catalog, so two of these may run at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from raymem.actors.calls import Peer, ask_all
from raymem.actors.placement import ShardInfo, choose, node_prefix
from raymem.errors import BackendUnavailable, Conflict, Moved, RaymemError
from raymem.host.lease import Watch
from raymem.logs import get_logger
from raymem.storage.store import ColdStore, Entry

log = get_logger("raymem.rehoming")
_AT_ONCE = 4


class Rehoming:
    """Watches the leases of a cluster's shards and gives the banks of those that ran out to shards that answer.

    Args:
        cold: the cluster's store.
        lease_s: how long the shards may be silent.
        shards: those that may take banks, at the time of the call.
        peer: finds a shard by its name.
        restart: ends a silent shard, so that a new incarnation begins and whoever waits for its answer hears.
    """

    def __init__(
        self,
        cold: ColdStore,
        lease_s: float,
        shards: Callable[[], Sequence[ShardInfo]],
        peer: Callable[[str], Peer],
        restart: Callable[[str], Any],
    ) -> None:
        self._cold = cold
        self._lease_s = lease_s
        self._shards = shards
        self._peer = peer
        self._restart = restart
        self._leases = Watch(cold.lease_table)
        self._moving: asyncio.Task[None] | None = None

    async def keep_up(self) -> None:
        """Look three times a lease, for ever."""
        while True:
            try:
                await self._look()
            except RaymemError as error:
                log.warning("leases not seen", error=str(error))
            await asyncio.sleep(self._lease_s / 3)

    async def _look(self) -> None:
        living = await asyncio.to_thread(self._leases.living)
        owners = await asyncio.to_thread(self._cold.catalog.owners)
        # a process outside the cluster that holds a bank is nobody's to replace; beside the watch: a look that comes
        # late sees nothing stand still
        if any(map(node_prefix, owners - living.keys())) and (self._moving is None or self._moving.done()):
            if left := await self._left():
                self._moving = asyncio.create_task(self._rehome(left))

    async def _left(self) -> list[Entry]:
        """Banks that were claimed under leases which are over."""
        entries = await asyncio.to_thread(self._cold.catalog.list)
        # who claims comes after: an owner that had come back by then, under the same name, is seen here
        living = await asyncio.to_thread(self._leases.living)
        hot = [entry for entry in entries if entry.state == "hot"]
        return [entry for entry in hot if node_prefix(entry.owner or "") and entry.owner not in living]

    async def _rehome(self, left: Sequence[Entry]) -> None:
        gone = {entry.owner or "" for entry in left}
        shards = self._shards()
        loads = await ask_all([self._peer(info.name) for info in shards], "bytes", timeout_s=self._lease_s)
        try:
            banks = await asyncio.to_thread(self._sizes, left)
            await self._spread(banks, shards, loads)
        except RaymemError as error:
            log.warning("banks not re-homed", owners=sorted(gone), error=str(error))
        for info in shards:
            if info.name in gone and _silent(loads[info.name]):
                log.warning("silent shard restarted", shard=info.name)
                await self._restart(info.name)

    def _sizes(self, left: Sequence[Entry]) -> list[tuple[Entry, int]]:
        """About how many bytes each bank takes in memory; large ones first."""
        return sorted(((entry, self._size(entry)) for entry in left), key=lambda pair: -pair[1])

    def _size(self, entry: Entry) -> int:
        try:
            return min(entry.spec.budget_bytes, self._cold.journal(entry).stats()["bytes"])
        except RaymemError:
            # whoever loads it hears why it can't be read
            return 0

    async def _spread(
        self, banks: Iterable[tuple[Entry, int]], shards: Sequence[ShardInfo], loads: Mapping[str, Any]
    ) -> None:
        planned = {name: dict(load) if isinstance(load, dict) else load for name, load in loads.items()}
        gate = asyncio.Semaphore(_AT_ONCE)
        moves = []
        for entry, size in banks:
            # an owner that answers had only stopped for a while
            back = [info for info in shards if info.name == entry.owner and isinstance(planned[info.name], dict)]
            target = choose(entry.name, back or shards, planned, prefer_gpu=any(info.gpu for info in shards)).name
            planned[target][entry.name] = size
            moves.append(self._attach(gate, entry, target))
        await asyncio.gather(*moves)

    async def _attach(self, gate: asyncio.Semaphore, entry: Entry, target: str) -> None:
        async with gate:
            try:
                await self._peer(target).call("attach", entry.name, entry.owner, entry.epoch)
            except (Moved, Conflict):
                # somebody was faster
                return
            except RaymemError as error:
                # it is still its last owner's in the catalog: the next look finds it again
                log.warning("bank not re-homed", bank=entry.name, target=target, error=str(error))
                return
        log.info("bank re-homed", bank=entry.name, source=entry.owner, target=target)


def _silent(answer: Any) -> bool:
    return isinstance(answer, BackendUnavailable) and bool(answer.details.get("silent"))
