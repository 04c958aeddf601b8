"""The backend for one process: a folder with the cold store, a host with the hot banks."""

from __future__ import annotations

import asyncio
import re
import socket
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import psutil
from torch import Tensor

from raymem.config import Settings
from raymem.errors import Conflict, InvalidInput, Moved, NotOwner
from raymem.host.backend import OwnerVerb, detached, shard_info
from raymem.host.host import Host, caller
from raymem.host.lease import Watch
from raymem.partition.backend import PartitionedBackend
from raymem.rows import AttendedRows, Trace
from raymem.storage.store import ColdStore, Entry, LeaseTable
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

P = ParamSpec("P")
T = TypeVar("T")
NODE = "local"
_OWNER = re.compile(r"process (?P<pid>\d+) since (?P<since>[\d.]+) on (?P<host>\S+) as \w+")


class LocalBackend(PartitionedBackend):
    """Banks in this process.

    A bank that another living process holds is refused; one whose process has died is taken over. On this machine the
    process table tells, elsewhere the owner's lease.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        super().__init__(ColdStore.open(uri, settings.cold.sync), settings)
        self.host = Host(self.cold, settings, owner=_this_process())

    async def attach_part(self, entry: Entry, node: str | None) -> Entry:
        """Load a part into this process."""
        if node not in (None, NODE):
            raise _no_node(node)
        if entry.owner not in (None, self.host.owner):
            await self._require_over(entry.name, entry.owner)
        # another host may have taken it meanwhile: take it only from the owner that we know of
        return await self.host.attach(entry.name, take_from=entry.owner or "")

    async def detach_part(self, name: str) -> None:
        """Flush, snapshot, free."""
        if not self.host.has(name):
            await self._reload(name)
        await self.host.detach(name)

    async def discard_part(self, name: str, owner: str | None) -> None:
        """Free a part that is about to be removed."""
        if owner not in (None, self.host.owner):
            await self._require_over(name, owner)
        await self.host.discard(name)

    async def write_part(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Journal and apply a copy of a trace: the caller may go on to change its tensors."""
        values = None if trace.values is None else trace.values.clone()
        own = replace(trace, hidden=trace.hidden.clone(), tokens=trace.tokens.clone(), values=values)
        return await self._owned(self.host.write, name, own, durable=durable, caller=caller.get())

    async def read_part(self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None) -> Readout:
        """Read a part, or what it was."""
        return await self._owned(self.host.read, name, hidden_QLD, k, start, as_of=as_of, caller=caller.get())

    async def attend_part(self, name: str, query: AttendQuery, as_of: str | float | None) -> MemoryTokens:
        """Choose rows of a part, or of what it was."""
        return await self._owned(self.host.attend, name, query, as_of=as_of, caller=caller.get())

    async def put_rows_part(self, name: str, rows: AttendedRows) -> AttendedExtent:
        """Keep keys and values of rows."""
        return await self._owned(self.host.put_rows, name, rows, caller=caller.get())

    async def migrate_part(self, name: str, to: str) -> MigrationReport:
        """There is one node here: a move to it moves nothing."""
        if to != NODE:
            raise _no_node(to)
        if not self.host.has(name):
            await self._reload(name)
        return MigrationReport(name, NODE, NODE, rows=0, pause_ms=0.0, total_ms=0.0)

    async def ask(self, name: str, verb: OwnerVerb, *args: Any) -> Any:
        """Run a verb of the host on a part."""
        return await self._owned(getattr(self.host, verb), name, *args)

    async def nodes(self) -> list[str]:
        """This process."""
        return [NODE]

    async def shards(self) -> list[ShardInfo]:
        """This process."""
        entries = await asyncio.to_thread(self.cold.catalog.list)
        return [shard_info(self.host.owner, NODE, entries, self.host.bytes(), self.host.memory_bytes, draining=False)]

    async def drain(self, node: str, undo: bool) -> DrainReport:
        """There is nowhere else to go."""
        if node != NODE:
            raise _no_node(node)
        if not undo:
            raise Conflict(f"node {node!r} is the only one: no other can take its banks; detach them: bank.detach()")
        return DrainReport(node, (), {}, total_ms=0.0, draining=False)

    async def stats(self) -> dict[str, Any]:
        """The host's counters, as those of the only shard."""
        return {"backend": "local", "cold": self.cold.uri, "sync": self.cold.sync, "shards": [await self.host.stats()]}

    async def close(self) -> None:
        """Flush and release every bank."""
        await self.host.close()

    def abandon(self) -> None:
        """Close after the event loop has ended: write what was accepted, and let the banks go."""
        self.host.end()

    async def hot_bytes(self) -> dict[str, int]:
        """Bytes of each hot bank here."""
        return self.host.bytes()

    def node_of(self, owner: str) -> str | None:
        """All owners of a local store are processes of this machine."""
        return NODE

    async def _owned(
        self, verb: Callable[Concatenate[str, P], Awaitable[T]], name: str, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run the host's verb on a part, again once it is loaded, and once more if it was lost meanwhile."""
        for _ in range(2):
            try:
                return await verb(name, *args, **kwargs)
            except (Moved, NotOwner):
                # it was not loaded, or the owner or the lease was lost: the catalog says who has the part now
                if not self.host.has(name):
                    await self._reload(name)
        return await verb(name, *args, **kwargs)

    async def _reload(self, name: str) -> None:
        """Load a part that the catalog says is hot, taking it from an owner that has ended."""
        entry = (await asyncio.to_thread(self.cold.catalog.get, name)).whole()
        if entry.state == "cold":
            raise detached(name)
        if entry.owner and not _OWNER.fullmatch(entry.owner):
            raise Conflict(
                f'bank {name!r} is hot on {entry.owner} of a Ray cluster: raymem.connect("ray"); if that cluster is '
                f"gone, take the bank: bank.attach() or `raymem bank attach {name}`",
                owner=entry.owner,
            )
        await self.attach_part(entry, None)

    async def _require_over(self, name: str, owner: str) -> None:
        if not await over(self.cold.lease_table, owner, self.settings.host.lease_s / 10):
            raise Conflict(
                f"bank {name!r} is held by {owner}; close it there, or share it: "
                "`raymem serve` and connect to its http:// address",
                owner=owner,
            )


def _no_node(node: str) -> InvalidInput:
    return InvalidInput(f"there is no node {node!r} in a local store; its only node is {NODE!r}")


def _this_process() -> str:
    process = psutil.Process()
    # the last word tells two stores of one process apart
    return (
        f"process {process.pid} since {process.create_time():.2f} on {socket.gethostname()} as {uuid.uuid4().hex[:8]}"
    )


async def over(lease_table: LeaseTable, owner: str, poll_s: float) -> bool:
    """Whether an owner, as the catalog names it, has ended: known at once of a process here, else by its lease.

    Args:
        lease_table: where its lease is.
        owner: the name.
        poll_s: how often to look whether it moves; it takes a third of its lease to say no, all of it to say yes.
    """
    known = _OWNER.fullmatch(owner)
    if known is not None and known["host"] == socket.gethostname():
        if not _runs(known):
            return True
        # a process may have closed its store and live on, or have its lease on the store that this is a copy of
        held = await asyncio.to_thread(lease_table.held, owner)
        if held is not None:
            return not held
    watch, stood = Watch(lease_table), 0.0
    while (now := (await asyncio.to_thread(watch.living)).get(owner)) is not None:
        if now < stood:
            return False
        stood = now
        await asyncio.sleep(poll_s)
    return True


def _runs(known: re.Match[str]) -> bool:
    try:
        return f"{psutil.Process(int(known['pid'])).create_time():.2f}" == known["since"]
    except psutil.NoSuchProcess:
        return False
