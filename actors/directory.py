"""The directory: one actor that keeps shards on all nodes and remembers where banks were last seen.

The catalog is the truth about banks. This is a cache of it that may die, double or lag: shards check every call, and a
caller that was sent to the wrong one asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from raymem.actors.calls import Peer
from raymem.actors.placement import Node, ShardInfo, Topology, node_prefix, shard_name
from raymem.actors.rehoming import Rehoming
from raymem.actors.shard import ClusterSpec, open_cas
from raymem.errors import RaymemError, Unavailable
from raymem.logs import get_logger
from raymem.storage.store import ColdStore, Entry

log = get_logger("raymem.directory")
_REFRESH_S = 5.0
# no shard reports that a bank was removed
_MOST_NAMES = 2**16


class Cluster(Protocol):
    """What the directory asks of Ray."""

    def nodes(self) -> list[Node]:
        """The living nodes."""

    async def start_shard(self, spec: ClusterSpec, node: Node, index: int) -> ShardInfo:
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


class Directory:
    """Keeps one set of shards over all living nodes; answers where a bank is.

    Args:
        spec: what the cluster was started with.
        cluster: makes the connection to Ray, once this object is where it will run.
    """

    def __init__(self, spec: ClusterSpec, cluster: Callable[[], Cluster]) -> None:
        self._spec = spec
        self._cluster = cluster()
        self._shards: dict[str, ShardInfo] = {}
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
            self._forget_dead({node.id for node in nodes}, {node.name for node in nodes})
            wanted = [node for node in nodes if retry_failed or not self._failed_for_good(node)]
            await asyncio.gather(*(self._ensure_node(node) for node in wanted))
            self._draining = await asyncio.to_thread(self._read_draining)
            shards = tuple(self._shards[name] for name in sorted(self._shards))
            return Topology(shards, dict(self._failures), self._draining)

    async def owner(self, bank: str, fresh: bool) -> str | None:
        """The owner of a hot bank, as last seen; None if it is cold or has none.

        Args:
            bank: its name.
            fresh: ask the catalog, for what is remembered turned out wrong.
        """
        self._watch()
        if fresh or bank not in self._owners:
            self._owners.pop(bank, None)
            entry = await asyncio.to_thread(self._look_up, bank)
            if entry.owner is None:
                return None
            if len(self._owners) >= _MOST_NAMES:
                self._owners.clear()
            self._owners[bank] = entry.owner
            return entry.owner
        return self._owners[bank]

    def _look_up(self, bank: str) -> Entry:
        return self._store().catalog.get(bank)

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
                # it may still come up: leave it to Ray, and ask again at the next round
                self._failures[node.name] = error
            except RaymemError as error:
                log.error("no shard on node", node=node.name, error=str(error))
                self._failures[node.name] = error
                await self._cluster.stop_shard(name)

    def _failed_for_good(self, node: Node) -> bool:
        return not isinstance(self._failures.get(node.name), Unavailable | None)

    def _forget_dead(self, ids: set[str], names: set[str]) -> None:
        self._shards = {name: info for name, info in self._shards.items() if info.node.id in ids}
        self._failures = {name: error for name, error in self._failures.items() if name in names}

    def _watch(self) -> None:
        # not in the constructor: a plain object may be made where no loop runs
        if self._maintenance is None or self._maintenance.done():
            self._maintenance = asyncio.create_task(self._keep_up())
        if self._rehoming is None or self._rehoming.done():
            self._rehoming = asyncio.create_task(self._rehome())

    async def _rehome(self) -> None:
        lease_s = self._spec.settings.host.lease_s
        cold = await asyncio.to_thread(self._store)
        await Rehoming(cold, lease_s, self._open, self._cluster.shard, self._cluster.restart_shard).keep_up()

    def _open(self) -> list[ShardInfo]:
        return [info for info in self._shards.values() if node_prefix(info.name) not in self._draining]

    def _read_draining(self) -> frozenset[str]:
        try:
            return self._store().draining.nodes()
        except RaymemError as error:
            # shards refuse by themselves what they must not take
            log.warning("draining nodes not read", error=str(error))
            return self._draining

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.ensure(retry_failed=False)
            except RaymemError as error:
                log.warning("nodes not refreshed", error=str(error))
