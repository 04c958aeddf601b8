"""A shard: one process that hosts many banks on one node or GPU. A plain class; `cluster.py` makes it an actor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from raymem.actors.calls import Peer, ask, watched
from raymem.actors.placement import draining, node_prefix
from raymem.actors.transfer import Packed, pack_fields, unpack, unpack_fields
from raymem.config import Settings
from raymem.errors import NotShared, RaymemError, Unavailable
from raymem.host.handover import MovingHost, Yielded
from raymem.logs import get_logger
from raymem.rows import AttendedRows, Trace
from raymem.storage.store import ColdStore
from raymem.types import Ack, AttendedExtent, AttendQuery, EraseReceipt, MigrationReport, Selection

log = get_logger("raymem.shard")
# applying so few rows takes no longer than the handover itself
_SHORT_ROWS = 256
_ROUNDS = 16


@dataclass(frozen=True)
class ClusterSpec:
    """What every shard of a cluster is started with: the cold store that all nodes share, its nonce, the settings."""

    cold: str
    sync: Literal["disk", "none"]
    nonce: str
    settings: Settings


class Shard:
    """The banks that the catalog says are hot under this shard's name.

    After a crash, a new incarnation under the same name loads them again: each bank at its first use, the others in the
    background. Every call is checked against what is hot here, so a caller with a stale route gets `Moved` or
    `BankDetached`.

    Args:
        name: the owner's name in the catalog.
        spec: the cluster's.
        device: where states live, "cpu" or "cuda:0".
        peer: finds another shard by its name.
    """

    def __init__(self, name: str, spec: ClusterSpec, device: str, peer: Callable[[str], Peer]) -> None:
        self.name = name
        self._spec = spec
        self._device = device
        self._peer = peer
        self._opening: asyncio.Task[MovingHost] | None = None
        self._recovery: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Open the cold store and begin to load the banks that are hot here; returns the process id.

        Raises:
            NotShared: this node sees another cold store than the one the cluster was started with.
        """
        await self._host()
        return os.getpid()

    async def write(self, name: str, trace: dict[str, Any], durable: bool, caller: str) -> Ack:
        """Journal and apply a trace that `pack_fields` packed."""
        host = await self._hot(name)
        given = unpack_fields(Trace, trace).checked(torch.float32)
        return await host.write(name, given, durable=durable, caller=caller)

    async def read(
        self, name: str, hidden_QLD: Packed, k: int, start: int, caller: str, as_of: str | float | None = None
    ) -> dict[str, Any]:
        """Read a bank, or what it was; return its Readout packed by `pack_fields`."""
        host = await self._hot(name)
        return pack_fields(await host.read(name, unpack(hidden_QLD), k, start, as_of=as_of, caller=caller))

    async def attend(
        self, name: str, query: dict[str, Any], caller: str, as_of: str | float | None = None
    ) -> dict[str, Any]:
        """Choose rows of a bank, or of what it was, by a query that `pack_fields` packed; so is what is returned."""
        host = await self._hot(name)
        return pack_fields(await host.attend(name, unpack_fields(AttendQuery, query), as_of=as_of, caller=caller))

    async def put_rows(self, name: str, rows: dict[str, Any], caller: str) -> AttendedExtent:
        """Keep keys and values of rows that `pack_fields` packed."""
        host = await self._hot(name)
        return await host.put_rows(name, unpack_fields(AttendedRows, rows), caller=caller)

    async def mark(self, name: str, tag: str) -> dict[str, int]:
        """As `Host.mark`."""
        return await (await self._hot(name)).mark(name, tag)

    async def materialise(self, name: str) -> None:
        """As `Host.materialise`."""
        await (await self._hot(name)).materialise(name)

    async def attach(self, name: str, take_from: str, epoch: int | None = None) -> None:
        """Claim and load a bank that is cold, without an owner, or owned by `take_from`, at `epoch` if given.

        Raises:
            Conflict: this node is being drained.
        """
        host = await self._host()
        await asyncio.to_thread(self._check_open, host.cold, name)
        await host.attach(name, take_from=take_from, epoch=epoch)

    async def detach(self, name: str) -> None:
        """Flush, snapshot and free a bank."""
        host = await self._hot(name)
        await host.detach(name)

    async def discard(self, name: str) -> None:
        """As `Host.discard`."""
        await (await self._host()).discard(name)

    async def digest(self, name: str) -> str:
        """sha256 of a bank's whole state."""
        host = await self._hot(name)
        return await host.digest(name)

    async def erase(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt:
        """Erase rows of a bank; the next call finishes one that was cut short, and then finds no row."""
        host = await self._hot(name)
        return await host.erase(name, what, rebuild=rebuild)

    async def release(self, name: str, stream: str | None) -> None:
        """As `Host.release`."""
        await (await self._hot(name)).release(name, stream)

    async def pull(self, name: str, source: str, stream: str, start: int) -> tuple[int, int]:
        """As `Host.pull`."""
        return await (await self._hot(name)).pull(name, source, stream, start)

    async def locate(self, name: str) -> str:
        """This shard's name, for a bank that is hot here."""
        await self._hot(name)
        return self.name

    async def migrate(self, name: str, to: str) -> MigrationReport:
        """Move a bank from here to the shard `to`."""
        host = await self._hot(name)
        if to == self.name:
            return MigrationReport(name, to, to, rows=0, pause_ms=0.0, total_ms=0.0)
        return await move(name, host, to, self._peer(to))

    async def prepare(self, name: str) -> int:
        """As `MovingHost.prepare`."""
        host = await self._host()
        await asyncio.to_thread(self._check_open, host.cold, name)
        return await host.prepare(name)

    async def adopt(self, name: str, source: Yielded) -> int:
        """As `MovingHost.adopt`."""
        return await (await self._host()).adopt(name, source)

    async def abandon(self, name: str) -> None:
        """As `MovingHost.abandon`."""
        (await self._host()).abandon(name)

    async def bytes(self) -> dict[str, int]:
        """Bytes of each hot bank's state."""
        return (await self._host()).bytes()

    async def memory(self) -> tuple[dict[str, int], int | None]:
        """Bytes of each bank that is loaded, and what they may take together."""
        host = await self._host()
        return host.bytes(), host.memory_bytes

    async def stats(self) -> dict[str, Any]:
        """Counters of this shard and its banks."""
        return await (await self._host()).stats() | {"pid": os.getpid()}

    async def close(self) -> None:
        """Flush every bank; they stay hot in the catalog."""
        await (await self._host()).close()

    def _check_open(self, cold: ColdStore, name: str) -> None:
        if node_prefix(self.name) in cold.draining.nodes() and cold.catalog.get(name).owner != self.name:
            raise draining(self.name)

    async def _hot(self, name: str) -> MovingHost:
        host = await self._host()
        if not host.has(name):
            await host.reopen(name)
        return host

    async def _host(self) -> MovingHost:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        # a caller that is cancelled must not cancel the start
        return await asyncio.shield(self._opening)

    async def _open(self) -> MovingHost:
        cold = await asyncio.to_thread(open_cas, self._spec, self.name)
        host = MovingHost(cold, self._spec.settings, owner=self.name, device=self._device)
        self._recovery = asyncio.create_task(self._recover(host))
        return host

    async def _recover(self, host: MovingHost) -> None:
        entries = await asyncio.to_thread(host.cold.catalog.list, "")
        mine = [entry.name for entry in entries if entry.state == "hot" and entry.owner == self.name]
        outcomes = await asyncio.gather(*map(host.reopen, mine), return_exceptions=True)
        for name, outcome in zip(mine, outcomes, strict=True):
            if isinstance(outcome, RaymemError):
                # the next call on the bank raises the same error
                log.warning("bank not recovered", bank=name, error=str(outcome))
            elif outcome is not None:
                raise outcome


async def move(name: str, source: MovingHost, to: str, target: Peer) -> MigrationReport:
    """Hand a bank over: copy it, let the copy catch up, stop writes, let the target claim it.

    Reads are answered throughout. Writes wait during the handover and then fail with `Moved`. If the source,
    which drives this, dies, the catalog names the source or already the target.

    Args:
        name: the bank.
        source: the host that owns it.
        to: the target's name in the catalog.
        target: the shard it goes to.

    Raises:
        Moved: it is being moved already.
        BackendUnavailable: the target died, or was silent for a lease.
        RaymemError: the target failed. It owns the bank if it had claimed it by then; otherwise the source keeps it.
    """
    began = time.perf_counter()
    silence_s = source.settings.host.lease_s
    try:
        await _copy(name, source, target, silence_s)
        paused = time.perf_counter()
        yielded = await source.yield_writes(name, to)
    except BaseException:
        await _abandon(name, target, silence_s)
        raise
    try:
        rows = await watched(target, "adopt", name, yielded, silence_s=silence_s)
    # a cancellation must not leave writes waiting for ever
    except BaseException:
        await source.resume(name)
        await _abandon(name, target, silence_s)
        raise
    pause_s = time.perf_counter() - paused
    await source.forget_moved(name)
    total_s = time.perf_counter() - began
    return MigrationReport(name, source.owner, to, rows=rows, pause_ms=1e3 * pause_s, total_ms=1e3 * total_s)


async def _copy(name: str, source: MovingHost, target: Peer, silence_s: float) -> None:
    # each round copies what was written during the last one; the bound is for a writer as fast as the copy
    reached = await watched(target, "prepare", name, silence_s=silence_s)
    for _ in range(_ROUNDS):
        if await source.quiesce(name) - reached <= _SHORT_ROWS:
            return
        reached = await watched(target, "prepare", name, silence_s=silence_s)


async def _abandon(name: str, target: Peer, silence_s: float) -> None:
    try:
        await ask(target, "abandon", name, timeout_s=silence_s / 3)
    except Unavailable:
        # a target that died holds nothing; a silent one runs the call when it wakes
        return


def open_cas(spec: ClusterSpec, who: str) -> ColdStore:
    """The cluster's cold store as this node sees it.

    Raises:
        NotShared: it isn't there, or it is another one.
    """
    fix = "put the cold store on storage that every node mounts at that path, or on an object store (s3://…)"
    # opening a folder that is not there would make an empty store
    if "://" not in spec.cold and not Path(spec.cold).is_dir():
        raise NotShared(f"{who} sees no cold store at {spec.cold}: {fix}", path=spec.cold)
    cold = ColdStore.open(spec.cold, spec.sync)
    if cold.nonce() != spec.nonce:
        raise NotShared(f"{who} sees another cold store at {spec.cold} than the cluster's: {fix}", path=spec.cold)
    return cold
