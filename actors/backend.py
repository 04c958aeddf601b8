"""The backend for a Ray cluster: banks are hot in shard actors, the catalog is read here."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from typing import Any

from torch import Tensor

from raymem.actors import cluster
from raymem.actors.calls import Remote, ask_all
from raymem.actors.placement import RunningShard, Topology, node_prefix
from raymem.actors.routing import Router, running_spec
from raymem.actors.shard import ClusterSpec, open_cas
from raymem.actors.transfer import pack, pack_fields, unpack_fields
from raymem.config import Settings
from raymem.errors import BankDetached, BankNotFound, ConfigError, Conflict, NotShared, RaymemError
from raymem.host.backend import OwnerVerb, shard_info
from raymem.host.host import Limiter, caller
from raymem.partition.backend import PartitionedBackend
from raymem.rows import AttendedRows, Trace
from raymem.storage.store import ColdStore, Entry
from raymem.types import (
    Ack,
    AttendedExtent,
    AttendQuery,
    DrainReport,
    MemoryTokens,
    MigrationReport,
    Readout,
    ShardInfo,
)


class RayBackend(PartitionedBackend):
    """Banks in the shard actors of a Ray cluster.

    A call goes to the shard where the bank was last seen. It is repeated where the bank has moved to, and, for up to
    `settings.actors.retry_s`, when the shard dies under it: rows are known by (stream, run, seq), so a write that had
    been journaled is acknowledged as already there.
    """

    def __init__(self, cold: ColdStore, directory: Remote, settings: Settings) -> None:
        super().__init__(cold, settings)
        self._router = Router(cold, directory, settings.actors)
        self._limiter = Limiter(settings.host)
        self._self = uuid.uuid4().hex

    @classmethod
    async def connect(cls, address: str, cold: str | None, settings: Settings) -> RayBackend:
        """Join a Ray cluster and start raymem's actors there if they don't run yet.

        Args:
            address: "ray" or ray://host:port.
            cold: the cold store that all nodes share; may be left out where raymem runs already.
            settings: limits here; the first to connect also gives the shards theirs.

        Raises:
            BackendUnavailable: no Ray cluster.
            ConfigError: no cold store named, or another than the one the cluster has.
            NotShared: a node, or this process, doesn't see the cold store.
        """
        await asyncio.to_thread(cluster.join, address)
        try:
            spec = await running_spec(Remote(cluster.DIRECTORY), settings.actors)
            if spec is None:
                return await cls._start(cold, settings)
            store = await asyncio.to_thread(_same_store, spec, cold)
            backend = cls(store, Remote(cluster.DIRECTORY), settings)
            topology = await backend._router.refresh(retry_failed=True)
            if not topology.shards:
                raise next(iter(topology.failures.values()))
            return backend
        except BaseException:
            await asyncio.to_thread(cluster.leave)
            raise

    @classmethod
    async def _start(cls, cold: str | None, settings: Settings) -> RayBackend:
        if cold is None:
            raise ConfigError(
                "raymem does not run on this Ray cluster yet, so name the cold store that its nodes share: "
                'raymem.connect("ray", cold="s3://…") or a folder that every node mounts'
            )
        store = await asyncio.to_thread(ColdStore.open, cold, settings.cold.sync)
        spec = ClusterSpec(store.uri, store.sync, await asyncio.to_thread(store.nonce), settings)
        backend = cls(store, await asyncio.to_thread(cluster.start_directory, spec), settings)
        topology = await backend._router.refresh()
        if topology.failures:
            # half a cluster is no use, and would keep the next try from naming another cold store
            await cluster.stop()
            raise next(iter(topology.failures.values()))
        return backend

    async def attach_part(self, entry: Entry, node: str | None) -> Entry:
        """Load a part on `node`, or on the shard with the fewest bytes; one that is hot there already stays.

        Raises:
            InvalidInput: no such node, naming those there are.
            Conflict: the bank is hot on another node, or held by a living process outside the cluster.
        """
        topology = await self._router.refresh()
        await self._router.load(entry.name, topology.taking(node), node)
        return await asyncio.to_thread(self.cold.catalog.get, entry.name)

    async def detach_part(self, name: str) -> None:
        """Flush, snapshot and free a part."""
        await self._router.call(name, "detach", done_if=BankDetached)
        self._router.forget(name)

    async def discard_part(self, name: str, owner: str | None) -> None:
        """Free a part that is about to be removed."""
        if owner is not None:
            await self._router.discard(name, owner)

    async def write_part(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Journal and apply a trace."""
        # the holder of a key is the same through every gateway
        asks = caller.get() or self._self
        with self._limiter.admit(asks, trace.nbytes):
            packed = pack_fields(trace)
            ack: Ack = await self._router.call_in_time(name, "write", packed, durable, asks)
        return ack

    async def read_part(self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None) -> Readout:
        """Read a part, or what it was."""
        # what a bank was may have to be made first, which takes as long as loading it
        call = self._router.call_in_time if as_of is None else self._router.call
        asks = caller.get() or self._self
        with self._limiter.admit(asks, hidden_QLD.nbytes):
            found = await call(name, "read", pack(hidden_QLD), k, start, asks, as_of)
        return unpack_fields(Readout, found)

    async def attend_part(self, name: str, query: AttendQuery, as_of: str | float | None) -> MemoryTokens:
        """Choose rows of a part, or of what it was."""
        asks = caller.get() or self._self
        with self._limiter.admit(asks, query.nbytes):
            # a first call reads the bank's states, which takes as long as loading it
            found = await self._router.call(name, "attend", pack_fields(query), asks, as_of)
        return unpack_fields(MemoryTokens, found)

    async def put_rows_part(self, name: str, rows: AttendedRows) -> AttendedExtent:
        """Keep keys and values of rows."""
        asks = caller.get() or self._self
        with self._limiter.admit(asks, rows.nbytes):
            kept: AttendedExtent = await self._router.call(name, "put_rows", pack_fields(rows), asks)
        return kept

    async def ask(self, name: str, verb: OwnerVerb, *args: Any) -> Any:
        """Run a verb of the shard that has a part."""
        return await self._router.call(name, verb, *args)

    async def migrate_part(self, name: str, to: str) -> MigrationReport:
        """Move a part to another node while it is read and written.

        Raises:
            InvalidInput: no such node, naming those there are.
        """
        topology = await self._router.refresh()
        owner = await self._router.call(name, "locate")
        stays = owner in {info.name for info in topology.on(to)}
        target = owner if stays else await self._router.least(name, topology.taking(to))
        return await self._move(name, target)

    async def _move(self, name: str, target: str) -> MigrationReport:
        report: MigrationReport = await self._router.call(name, "migrate", target)
        self._router.forget(name)
        source, target = (self.node_of(shard) or shard for shard in (report.source, report.target))
        return dataclasses.replace(report, source=source, target=target)

    async def nodes(self) -> list[str]:
        """The nodes that have a shard."""
        return (await self._router.refresh()).nodes

    async def shards(self) -> list[ShardInfo]:
        """The shards that answer, and the room each has."""
        topology, answers = await self._ask_shards("memory")
        entries = await asyncio.to_thread(self.cold.catalog.list)
        return [
            shard_info(info.name, info.node.name, entries, *answer, draining=topology.is_draining(info.name))
            for info in topology.shards
            if not isinstance(answer := answers[info.name], RaymemError)
        ]

    async def drain(self, node: str, undo: bool) -> DrainReport:
        """Move every bank away from a node; what it may not take meanwhile is written down in the cold store.

        Raises:
            InvalidInput: no such node, naming those there are.
            Conflict: no other node takes banks.
        """
        began = time.perf_counter()
        topology = await self._router.refresh()
        leaving = topology.on(node)
        mark = self.cold.draining.end if undo else self.cold.draining.begin
        others = [info for info in topology.shards if info not in leaving and not topology.is_draining(info.name)]
        if not undo and not others:
            raise Conflict(f"node {node!r} is the only one: no other can take its banks; detach them: bank.detach()")
        for prefix in {node_prefix(info.name) for info in leaving}:
            await asyncio.to_thread(mark, prefix)
        moved, failed = ([], {}) if undo else await self._empty({info.name for info in leaving}, others)
        total_ms = 1e3 * (time.perf_counter() - began)
        return DrainReport(node, tuple(moved), failed, total_ms=total_ms, draining=not undo)

    async def _empty(
        self, leaving: set[str], others: list[RunningShard]
    ) -> tuple[list[MigrationReport], dict[str, str]]:
        moved: list[MigrationReport] = []
        failed: dict[str, str] = {}
        # again, for what came while the others went
        while True:
            entries = await asyncio.to_thread(self.cold.catalog.list)
            names = [entry.name for entry in entries if entry.owner in leaving and entry.name not in failed]
            if not names:
                return moved, failed
            for name in names:
                try:
                    moved.append(await self._move(name, await self._router.least(name, others)))
                except (BankDetached, BankNotFound):
                    # another caller detached or removed it
                    continue
                except RaymemError as error:
                    failed[name] = error.message

    async def stats(self) -> dict[str, Any]:
        """Counters of every shard; one that does not answer has its error in their place."""
        topology, answers = await self._ask_shards("stats")
        shards = [
            {"shard": name, "node": topology.node_of(name)} | _plain(name, answer) for name, answer in answers.items()
        ]
        failed = {node: error.to_wire() for node, error in topology.failures.items()}
        about = {"backend": "ray", "cold": self.cold.uri, "sync": self.cold.sync}
        return about | {"shards": shards, "failed_nodes": failed}

    async def close(self) -> None:
        """Disconnect; shards and their banks stay."""
        await asyncio.to_thread(cluster.leave)

    def abandon(self) -> None:
        """As `close`, without an event loop."""
        cluster.leave()

    async def hot_bytes(self) -> dict[str, int]:
        """Bytes of each hot bank, of the shards that answer."""
        _, answers = await self._ask_shards("bytes")
        return {bank: size for answer in answers.values() if isinstance(answer, dict) for bank, size in answer.items()}

    def node_of(self, owner: str) -> str | None:
        """The node that a shard is on, if the shard is known."""
        return self._router.topology.node_of(owner)

    async def _ask_shards(self, method: str) -> tuple[Topology, dict[str, Any]]:
        topology = await self._router.refresh()
        return topology, await ask_all([self._router.remote(info.name) for info in topology.shards], method)


def _plain(shard: str, answer: Any) -> dict[str, Any]:
    return {"owner": shard, "error": answer.to_wire()} if isinstance(answer, RaymemError) else dict(answer)


def _same_store(spec: ClusterSpec, cold: str | None) -> ColdStore:
    try:
        return open_cas(dataclasses.replace(spec, cold=cold or spec.cold), "this process")
    except NotShared as error:
        if cold is None:
            raise
        raise ConfigError(
            f"raymem runs on this Ray cluster with its cold store at {spec.cold}, which {cold} is not; leave cold out "
            "to use it, or end raymem there first: `python -m raymem.actors stop`"
        ) from error
