"""The directory: one actor that keeps shards on all nodes, caches which shard owns a bank, and rehomes banks.

The catalog is the truth about banks. The directory caches it, and may die, run twice or lag: shards check every call,
and a caller with a wrong answer asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from raymem.actors.calls import Peer, ask_all
from raymem.actors.placement import Node, RunningShard, Topology, choose, node_prefix, shard_name
from raymem.actors.shard import ClusterSpec, open_cas
from raymem.errors import BackendUnavailable, Conflict, Moved, RaymemError, Unavailable
from raymem.host.lease import Watch
from raymem.logs import get_logger
from raymem.storage.store import ColdStore, Entry

log = get_logger("raymem.directory")
_REFRESH_S = 5.0
# no shard reports that a bank was removed
_MOST_NAMES = 2**16
_ATTACHES_AT_ONCE = 4


class Cluster(Protocol):
    """What the directory asks of Ray."""

    def nodes(self) -> list[Node]:
        """The living nodes."""

    async def start_shard(self, spec: ClusterSpec, node: Node, index: int) -> RunningShard:
        """Make sure that a shard runs on a node and sees the cold store.

        Raises:
            NotShared: it doesn't.
        """

    async def stop_shard(self, name: str) -> None:
        """End a shard that could not start."""

    async def restart_shard(self, name: str) -> None:
        """End a shard that is silent; a new one begins under its name."""

    def shard(self, name: str) -> Peer:
        """A shard by its name."""


class Rehoming:
    """Watches the leases of a cluster's shards and gives the banks of expired ones to shards that answer.

    The lease alone decides that an owner is gone: a shard whose node left, a silent one, and one cut off from here.
    Taking a bank over is a compare-and-swap in the catalog, so two of these may run at once.

    Args:
        cold: the cluster's store.
        lease_s: how long the shards may be silent.
        shards: those that may take banks, at the time of the call.
        peer: finds a shard by its name.
        restart: ends a silent shard, so that a new incarnation begins and calls that wait for it fail.
    """

    def __init__(
        self,
        cold: ColdStore,
        lease_s: float,
        shards: Callable[[], Sequence[RunningShard]],
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
        """Check the leases three times in each lease, until cancelled."""
        while True:
            try:
                await self._look()
            except RaymemError as error:
                log.warning("leases not seen", error=str(error))
            await asyncio.sleep(self._lease_s / 3)

    async def _look(self) -> None:
        living = await asyncio.to_thread(self._leases.living)
        owners = await asyncio.to_thread(self._cold.catalog.owners)
        # only shards are replaced, not owners outside the cluster. the moves run in a task beside this watch, because a
        # late check of the leases sees none expire
        if any(map(node_prefix, owners - living.keys())) and (self._moving is None or self._moving.done()):
            if left := await self._left():
                self._moving = asyncio.create_task(self._rehome(left))

    async def _left(self) -> list[Entry]:
        """The banks of shards whose leases have expired."""
        entries = await asyncio.to_thread(self._cold.catalog.list)
        # read after the catalog: an owner that came back under the same name by then is alive here
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
            load = loads[info.name]
            if info.name in gone and isinstance(load, BackendUnavailable) and load.details.get("silent"):
                log.warning("silent shard restarted", shard=info.name)
                await self._restart(info.name)

    def _sizes(self, left: Sequence[Entry]) -> list[tuple[Entry, int]]:
        """About how many bytes each bank takes in memory; large ones first."""

        def size(entry: Entry) -> int:
            try:
                return min(entry.spec.budget_bytes, self._cold.journal(entry).stats()["bytes"])
            except RaymemError:
                # the shard that loads it reports why it can't be read
                return 0

        return sorted(((entry, size(entry)) for entry in left), key=lambda pair: -pair[1])

    async def _spread(
        self, banks: Iterable[tuple[Entry, int]], shards: Sequence[RunningShard], loads: Mapping[str, Any]
    ) -> None:
        planned = {name: dict(load) if isinstance(load, dict) else load for name, load in loads.items()}
        gate = asyncio.Semaphore(_ATTACHES_AT_ONCE)
        moves = []
        for entry, size in banks:
            # an owner that answers had only paused: its banks go back to it
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
                # another owner was faster
                return
            except RaymemError as error:
                # the catalog still names the last owner, so the next check finds the bank again
                log.warning("bank not re-homed", bank=entry.name, target=target, error=str(error))
                return
        log.info("bank re-homed", bank=entry.name, source=entry.owner, target=target)


class Directory:
    """Keeps one set of shards on all living nodes; answers which shard owns a bank.

    Args:
        spec: what the cluster was started with.
        cluster: makes the connection to Ray; called where the directory runs.
    """

    def __init__(self, spec: ClusterSpec, cluster: Callable[[], Cluster]) -> None:
        self._spec = spec
        self._cluster = cluster()
        self._shards: dict[str, RunningShard] = {}
        self._failures: dict[str, RaymemError] = {}
        self._draining: frozenset[str] = frozenset()
        self._owners: dict[str, str] = {}
        self._ensuring = asyncio.Lock()
        self._cold: ColdStore | None = None
        self._maintenance: asyncio.Task[None] | None = None
        self._rehoming: asyncio.Task[None] | None = None

    async def spec(self) -> ClusterSpec:
        """What the cluster was started with."""
        return self._spec

    async def ensure(self, retry_failed: bool = True) -> Topology:
        """Start what is missing on the nodes that are alive now; return what there is."""
        self._watch()
        async with self._ensuring:
            nodes = await asyncio.to_thread(self._cluster.nodes)
            ids, names = {node.id for node in nodes}, {node.name for node in nodes}
            self._shards = {name: info for name, info in self._shards.items() if info.node.id in ids}
            self._failures = {name: error for name, error in self._failures.items() if name in names}
            # Ray may still start a shard on a node that was only unavailable
            failed = {name for name, error in self._failures.items() if not isinstance(error, Unavailable)}
            wanted = [node for node in nodes if retry_failed or node.name not in failed]
            await asyncio.gather(*(self._ensure_node(node) for node in wanted))
            self._draining = await asyncio.to_thread(self._read_draining)
            shards = tuple(self._shards[name] for name in sorted(self._shards))
            return Topology(shards, dict(self._failures), self._draining)

    async def owner(self, bank: str, fresh: bool) -> str | None:
        """The owner of a hot bank, as last seen; None if it is cold or has none.

        Args:
            bank: its name.
            fresh: read the catalog, because the cached owner was wrong.
        """
        self._watch()
        if fresh or bank not in self._owners:
            self._owners.pop(bank, None)
            entry = await asyncio.to_thread(lambda: self._store().catalog.get(bank))
            if entry.owner is None:
                return None
            if len(self._owners) >= _MOST_NAMES:
                self._owners.clear()
            self._owners[bank] = entry.owner
            return entry.owner
        return self._owners[bank]

    def _store(self) -> ColdStore:
        if self._cold is None:
            self._cold = open_cas(self._spec, "the directory")
        return self._cold

    async def _ensure_node(self, node: Node) -> None:
        for index in range(self._spec.settings.actors.shards_per_node):
            name = shard_name(node.id, index)
            if name in self._shards:
                continue
            try:
                self._shards[name] = await self._cluster.start_shard(self._spec, node, index)
                self._failures.pop(node.name, None)
            except Unavailable as error:
                # Ray may still start it: ask again in the next round
                self._failures[node.name] = error
            except RaymemError as error:
                log.error("no shard on node", node=node.name, error=str(error))
                self._failures[node.name] = error
                await self._cluster.stop_shard(name)

    def _watch(self) -> None:
        # not in the constructor, which may run without an event loop
        if self._maintenance is None or self._maintenance.done():
            self._maintenance = asyncio.create_task(self._keep_up())
        if self._rehoming is None or self._rehoming.done():
            self._rehoming = asyncio.create_task(self._rehome())

    async def _rehome(self) -> None:
        lease_s = self._spec.settings.host.lease_s
        cold = await asyncio.to_thread(self._store)
        await Rehoming(cold, lease_s, self._open, self._cluster.shard, self._cluster.restart_shard).keep_up()

    def _open(self) -> list[RunningShard]:
        return [info for info in self._shards.values() if node_prefix(info.name) not in self._draining]

    def _read_draining(self) -> frozenset[str]:
        try:
            return self._store().draining.nodes()
        except RaymemError as error:
            # shards check for themselves whether their node is being drained
            log.warning("draining nodes not read", error=str(error))
            return self._draining

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.ensure(retry_failed=False)
            except RaymemError as error:
                log.warning("nodes not refreshed", error=str(error))
