"""What a place of hosts gives to the banks on it: one part of a bank at a time, which its owner works on."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from raymem.config import Settings
from raymem.errors import BankDetached, Conflict, NotOwner, RaymemError
from raymem.logs import get_logger
from raymem.rows import AttendedRows, Trace
from raymem.storage.catalog import Line
from raymem.storage.erasure.erase import record_forks
from raymem.storage.erasure.reach import inherited
from raymem.storage.history import materialise_cold
from raymem.storage.store import ColdStore, Entry
from raymem.types import (
    Ack,
    AttendedExtent,
    AttendQuery,
    DrainReport,
    EraseReceipt,
    MemoryTokens,
    MigrationReport,
    Readout,
    Selection,
    ShardInfo,
)

log = get_logger("raymem.host.backend")
_REMOVALS = 8
OwnerVerb = Literal["digest", "erase", "mark", "materialise", "pull", "release"]


class Hosts(ABC):
    """Hosts over one cold store: a process has one, a Ray cluster many.

    A part is a partition of a bank, or a whole bank; `raymem.partition.backend` makes banks of them.
    """

    def __init__(self, cold: ColdStore, settings: Settings) -> None:
        self.cold = cold
        self.settings = settings

    @abstractmethod
    async def attach_part(self, entry: Entry, node: str | None) -> Entry:
        """Load a part on `node`, or where there is room; return what the catalog says of it then."""

    @abstractmethod
    async def detach_part(self, name: str) -> None:
        """Flush, snapshot and free a hot part."""

    @abstractmethod
    async def discard_part(self, name: str, owner: str | None) -> None:
        """Free a part that is about to be removed, without a look at it; nothing if its owner has ended.

        Raises:
            Conflict: its owner lives elsewhere.
        """

    async def remove_part(self, line: Line) -> None:
        """Free a part and remove it; again where an owner has claimed it in between.

        Raises:
            Conflict: its owner lives elsewhere, or it has forks.
        """
        for _ in range(_REMOVALS):
            await self.discard_part(line.name, line.owner)
            try:
                return await asyncio.to_thread(self.cold.remove, line.name, line)
            except NotOwner:
                line = await asyncio.to_thread(self.cold.catalog.line, line.name)
        raise Conflict(f"bank {line.name!r} is attached again and again meanwhile; stop that, then remove it")

    @abstractmethod
    async def write_part(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Journal and apply a trace."""

    @abstractmethod
    async def read_part(self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None) -> Readout:
        """Read a part, or what it was."""

    @abstractmethod
    async def attend_part(self, name: str, query: AttendQuery, as_of: str | float | None) -> MemoryTokens:
        """Choose the rows of a part, or of what it was, that a model is to attend to."""

    @abstractmethod
    async def put_rows_part(self, name: str, rows: AttendedRows) -> AttendedExtent:
        """Keep keys and values of rows beside a part's journal."""

    @abstractmethod
    async def migrate_part(self, name: str, to: str) -> MigrationReport:
        """Move a part to another node while it is read and written."""

    @abstractmethod
    async def ask(self, name: str, verb: OwnerVerb, *args: Any) -> Any:
        """Have the owner of a hot part run a verb of `Host` on it, which has these arguments after the name."""

    @abstractmethod
    async def hot_bytes(self) -> dict[str, int]:
        """Bytes of each hot part's state."""

    @abstractmethod
    def node_of(self, owner: str) -> str | None:
        """The node an owner lives on, if known."""

    @abstractmethod
    async def nodes(self) -> list[str]:
        """Where parts can live."""

    @abstractmethod
    async def shards(self) -> list[ShardInfo]:
        """The processes that parts are hot in, and the room each has."""

    @abstractmethod
    async def drain(self, node: str, undo: bool) -> DrainReport:
        """Move every part away from a node."""

    @abstractmethod
    async def stats(self) -> dict[str, Any]:
        """Counters of the hosts and of each hot part."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the hosts."""

    @abstractmethod
    def abandon(self) -> None:
        """As `close`, once the event loop has ended."""

    async def materialise_part(self, name: str) -> None:
        """Give a fork a journal of its own, so that it needs its parent no more."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        if entry.parent is None:
            return
        if entry.state == "hot":
            await self.ask(name, "materialise")
        else:
            await asyncio.to_thread(materialise_cold, self.cold, entry)

    async def erase_part(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt:
        """Erase rows of a part, hot or cold, and of its forks; a cold one is loaded for it and detached again."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        if entry.state == "cold":
            await self.attach_part(entry, None)
        try:
            receipt: EraseReceipt = await self.ask(name, "erase", what, rebuild)
        finally:
            if entry.state == "cold":
                await self.detach_part(name)
        return await self.erase_in_forks(entry, receipt, rebuild)

    async def erase_in_forks(self, entry: Entry, receipt: EraseReceipt, rebuild: bool) -> EraseReceipt:
        """Erase in a part's forks what was erased in it; return its receipt with what became of that."""
        forks = await asyncio.to_thread(self.cold.catalog.forks, entry.id)
        done: dict[str, str] = {}
        for fork in forks:
            try:
                there = await self.erase_part(fork.name, inherited(receipt.what, fork.base), rebuild)
            except RaymemError as error:
                # the receipt says that it is not done; a sweep tries again
                log.warning("not erased in a fork", bank=entry.name, fork=fork.name, error=str(error))
                done[fork.name] = ""
            else:
                done |= {fork.name: there.id} if there.rows else {}
        return await asyncio.to_thread(record_forks, self.cold, receipt, done) if forks else receipt


def shard_info(
    name: str, node: str, entries: Iterable[Entry], hot: dict[str, int], memory_bytes: int | None, *, draining: bool
) -> ShardInfo:
    """A shard's line, from the catalog's entries and the bytes of the banks that it has loaded."""
    mine = [entry for entry in entries if entry.owner == name]
    pinned = sum(hot.get(entry.name, 0) for entry in mine if entry.pinned)
    return ShardInfo(name, node, len(mine), len(hot), sum(hot.values()), pinned, memory_bytes, draining)


def detached(name: str) -> BankDetached:
    """The error for a read or write of a cold bank."""
    return BankDetached(f"bank {name!r} is detached; attach it first: bank.attach() or `raymem bank attach {name}`")
