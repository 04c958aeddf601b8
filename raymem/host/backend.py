"""Where memory lives: the seam under `Store`, and what the two backends that see the cold store share."""

from __future__ import annotations

import asyncio
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from raymem.config import Settings
from raymem.encode.calibration import Calibration
from raymem.errors import BankDetached, BankNotFound, CalibrationNotFound, Conflict, Corrupt, RaymemError
from raymem.logs import get_logger
from raymem.memory.learned import Learned
from raymem.storage.erasure.erase import record_forks
from raymem.storage.erasure.reach import inherited
from raymem.storage.export.export import export_bank
from raymem.storage.export.imports import import_bank
from raymem.storage.history import fork_at, fork_position, materialise_cold, restore_to
from raymem.storage.store import ColdStore, Entry
from raymem.storage.sweeper import sweep
from raymem.storage.vanished import telling
from raymem.types import (
    Ack,
    BankInfo,
    BankSpec,
    DrainReport,
    EraseReceipt,
    MergeReport,
    MigrationReport,
    Readout,
    RebalanceReport,
    RestoreReport,
    Selection,
    ShardInfo,
    SweepReport,
    Trace,
)

T = TypeVar("T")
log = get_logger("raymem.host.backend")


class Backend(Protocol):
    """Every verb of a store. Names are checked before they come here."""

    async def create(self, name: str, spec: BankSpec, partitions: int) -> BankInfo: ...
    async def info(self, name: str) -> BankInfo: ...
    async def banks(self, prefix: str) -> list[BankInfo]: ...
    async def delete(self, name: str, materialise: bool) -> None: ...
    async def write(self, name: str, trace: Trace, durable: bool) -> Ack: ...
    async def read(
        self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None, allow_partial: bool
    ) -> Readout: ...
    async def attach(self, name: str, node: str | None) -> BankInfo: ...
    async def detach(self, name: str) -> BankInfo: ...
    async def migrate(self, name: str, to: str, partition: int | None) -> MigrationReport: ...
    async def grow(self, name: str, partitions: int) -> BankInfo: ...
    async def rebalance(self, name: str) -> RebalanceReport: ...
    async def pin(self, name: str, pinned: bool) -> BankInfo: ...
    async def tag(self, name: str, tag: str) -> dict[str, int]: ...
    async def untag(self, name: str, tag: str) -> dict[str, int]: ...
    async def restore(self, name: str, at: str | int) -> RestoreReport: ...
    async def fork(self, source: str, target: str, at: str | int | None) -> BankInfo: ...
    async def materialise(self, name: str) -> BankInfo: ...
    async def merge(self, target: str, sources: list[str], rebuild: bool, rename: bool) -> MergeReport: ...
    async def digest(self, name: str) -> str: ...
    async def tokens(self, name: str, stream: str, run: str, seq_from: int, seq_to: int) -> Tensor: ...
    async def export(self, name: str, path: Path) -> int: ...
    async def import_(self, path: Path, name: str) -> BankInfo: ...
    async def erase(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt: ...
    async def receipts(self, name: str, forget_names: bool) -> list[EraseReceipt]: ...
    async def set_ttl(self, name: str, ttl_s: float | None) -> BankInfo: ...
    async def sweep(self, dry_run: bool) -> SweepReport: ...
    async def put_calibration(self, calibration: Calibration) -> str: ...
    async def calibration(self, content: str, layers: tuple[int, ...]) -> Calibration: ...
    async def put_params(self, learned: Learned) -> str: ...
    async def params(self, params: str) -> Learned: ...
    async def nodes(self) -> list[str]: ...
    async def shards(self) -> list[ShardInfo]: ...
    async def drain(self, node: str, undo: bool) -> DrainReport: ...
    async def stats(self) -> dict[str, Any]: ...
    async def close(self) -> None: ...
    def abandon(self) -> None: ...


@telling
class ColdBackend(ABC):
    """Banks one by one: the verbs that need the catalog and the cold store alone; placing is left to the backends.

    A partitioned bank is no bank here, its partitions are: `raymem.partition.backend` makes one of them.
    """

    def __init__(self, cold: ColdStore, settings: Settings) -> None:
        self.cold = cold
        self.settings = settings

    @abstractmethod
    async def attach(self, name: str, node: str | None) -> BankInfo:
        """Load a bank on `node`, or wherever there is room."""

    @abstractmethod
    async def detach(self, name: str) -> BankInfo:
        """Settle, snapshot and free a hot bank."""

    @abstractmethod
    async def discard(self, name: str, owner: str | None) -> None:
        """Free a bank that is about to be removed, without a look at it; nothing if its owner has ended.

        Raises:
            Conflict: its owner lives elsewhere.
        """

    @abstractmethod
    async def write(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Journal and apply a trace."""

    @abstractmethod
    async def read(self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None) -> Readout:
        """Read a bank, or what it was."""

    @abstractmethod
    async def digest(self, name: str) -> str:
        """sha256 of the bank's state."""

    @abstractmethod
    async def migrate(self, name: str, to: str) -> MigrationReport:
        """Move a bank to another node while it is read and written."""

    @abstractmethod
    async def release(self, name: str, stream: str | None) -> None:
        """Finish writes to a partition; its owner then looks up where a stream, or any, lives before later ones."""

    @abstractmethod
    async def pull(self, name: str, source: str, stream: str, start: int) -> tuple[int, int]:
        """Have a bank's owner copy a stream from another bank's journal; see `Host.pull`."""

    @abstractmethod
    async def mark(self, name: str, tag: str) -> dict[str, int]:
        """Tag a hot bank where its owner is now."""

    @abstractmethod
    async def materialise_hot(self, name: str) -> None:
        """Have the owner of a hot fork copy what it inherited."""

    @abstractmethod
    async def erase_hot(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt:
        """Erase rows of a hot bank, by its owner."""

    @abstractmethod
    async def hot_bytes(self) -> dict[str, int]:
        """Bytes of each hot bank's state."""

    @abstractmethod
    def node_of(self, owner: str) -> str | None:
        """The node an owner lives on, if known."""

    async def create(self, name: str, spec: BankSpec) -> BankInfo:
        """Enter a bank in the catalog and attach it.

        Raises:
            CalibrationNotFound: the store has none for the fingerprint's model and layers.
            InvalidSpec, BankExists: nothing was created.
        """
        checked = await asyncio.to_thread(self.complete, spec)
        await asyncio.to_thread(self.cold.catalog.create, name, checked)
        return await self.attach(name, None)

    async def info(self, name: str) -> BankInfo:
        """One bank's line."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        hot = await self.hot_bytes() if entry.state == "hot" else {}
        return await asyncio.to_thread(self._present, entry, hot)

    async def banks(self, prefix: str) -> list[BankInfo]:
        """The lines of all banks, partitions too, whose names begin with `prefix`, by name."""
        entries = await asyncio.to_thread(self.cold.catalog.list, prefix)
        hot = await self.hot_bytes()
        found = []
        for entry in entries:
            try:
                if entry.state != "split":
                    found.append(await asyncio.to_thread(self._present, entry, hot))
            except BankNotFound:
                # it was there when they were listed
                continue
        return found

    async def delete(self, name: str, materialise: bool) -> None:
        """Remove a bank with all its rows, snapshots and tags, whatever they hold: nothing is loaded or saved for it.

        Raises:
            Conflict: it has forks and `materialise` is False, naming them.
        """
        catalog = self.cold.catalog
        line = await asyncio.to_thread(catalog.line, name)
        for fork in await asyncio.to_thread(catalog.forks, line.id) if materialise else []:
            await self.materialise(fork.name)
        await asyncio.to_thread(catalog.require_no_forks, line)
        await self.discard(name, line.owner)
        await asyncio.to_thread(self.cold.remove, name)

    async def pin(self, name: str, pinned: bool) -> BankInfo:
        """Keep a bank in memory when room is needed, or no longer."""
        await asyncio.to_thread(self.cold.catalog.pin, name, pinned)
        return await self.info(name)

    async def tag(self, name: str, tag: str) -> dict[str, int]:
        """Name the journal's present position; the owner of a bounded state keeps the state there."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        if entry.state == "hot":
            return await self.mark(name, tag)

        def put() -> dict[str, int]:
            self.cold.catalog.tag(name, tag, self.cold.journal(entry).end())
            return self.cold.catalog.tags(name)

        return await asyncio.to_thread(put)

    async def untag(self, name: str, tag: str) -> dict[str, int]:
        """Forget a tag; return those that are left."""

        def drop() -> dict[str, int]:
            self.cold.catalog.untag(name, tag)
            return self.cold.catalog.tags(name)

        return await asyncio.to_thread(drop)

    async def restore(self, name: str, at: str | int) -> RestoreReport:
        """Go back to a tag or position; what came after stays in a bank of its own."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        was_hot = entry.state == "hot"
        if was_hot:
            await asyncio.to_thread(fork_position, self.cold, entry, at)
            await self.detach(name)
        try:
            return await asyncio.to_thread(restore_to, self.cold, name, at)
        finally:
            if was_hot:
                await self.attach(name, None)

    async def fork(self, source: str, target: str, at: str | int | None) -> BankInfo:
        """Create `target` from the rows that `source` has up to a tag or position; nothing is copied.

        The fork of an attached bank is attached too, and loads when it is first used.
        """
        await asyncio.to_thread(fork_at, self.cold, source, target, at)
        return await self.info(target)

    async def materialise(self, name: str) -> BankInfo:
        """Give a fork a journal of its own, so that it needs its parent no more."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        if entry.parent is not None:
            if entry.state == "hot":
                await self.materialise_hot(name)
            else:
                await asyncio.to_thread(materialise_cold, self.cold, entry)
        return await self.info(name)

    async def merge(self, target: str, sources: list[str], rebuild: bool, rename: bool) -> MergeReport:
        """Create a bank from the rows of several; it is attached, and loads when it is first used."""
        from raymem.bank.merge import merge_banks

        return await asyncio.to_thread(merge_banks, self.cold, target, sources, rebuild=rebuild, rename=rename)

    async def tokens(self, name: str, stream: str, run: str, seq_from: int, seq_to: int) -> Tensor:
        """Token ids of a run's rows from `seq_from` to `seq_to` (exclusive), in order."""

        def find() -> Tensor:
            journal = self.cold.journal(self.cold.catalog.get(name))
            return journal.tokens(stream, run, seq_from, seq_to)

        return await asyncio.to_thread(find)

    async def export(self, name: str, path: Path) -> int:
        """Write the bank to one file; return its bytes."""
        await asyncio.to_thread(export_bank, self.cold, name, path)
        return path.stat().st_size

    async def import_(self, path: Path, name: str) -> BankInfo:
        """Create a bank from an exported file, checked whole before anything becomes visible; it starts cold."""
        await asyncio.to_thread(import_bank, self.cold, path, name)
        return await self.info(name)

    async def erase(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt:
        """Erase rows of a bank, hot or cold, and of its forks; a cold one is loaded for it and detached again."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        if entry.state == "hot":
            receipt = await self.erase_hot(name, what, rebuild)
        else:
            await self.attach(name, None)
            try:
                receipt = await self.erase_hot(name, what, rebuild)
            finally:
                await self.detach(name)
        return await self._erase_in_forks(entry, receipt, rebuild)

    async def receipts(self, name: str, forget_names: bool) -> list[EraseReceipt]:
        """The receipts of what was erased in a bank, oldest first; without names in those that are finished."""
        kept = self.cold.receipts
        return await asyncio.to_thread(kept.forget_names if forget_names else kept.of, name)

    async def set_ttl(self, name: str, ttl_s: float | None) -> BankInfo:
        """Let rows expire that are older than `ttl_s` seconds, or none."""

        def change() -> None:
            self.cold.catalog.change(self.cold.catalog.get(name), ttl_s=ttl_s)

        await asyncio.to_thread(change)
        return await self.info(name)

    async def sweep(self, dry_run: bool) -> SweepReport:
        """Delete what the catalog doesn't name, and finish erasures that were cut short."""
        report = await asyncio.to_thread(sweep, self.cold, self.settings.cold.sweep_age_s, dry_run=dry_run)
        return dataclasses.replace(report, receipts=tuple([await self._go_on(receipt) for receipt in report.receipts]))

    async def put_calibration(self, calibration: Calibration) -> str:
        """Keep a calibration; return its hash.

        Raises:
            InvalidInput: no keys can be made with it, naming the field and its value.
        """
        blob = calibration.check().to_bytes()
        put = self.cold.calibrations.put
        await asyncio.to_thread(put, calibration.hash, calibration.model, calibration.layers, blob)
        return calibration.hash

    async def calibration(self, content: str, layers: tuple[int, ...]) -> Calibration:
        """The store's calibration for a model's content hash and layers."""

        def find() -> Calibration:
            found = self.cold.calibrations.find(content, layers)
            if found is None:
                raise _no_calibration(content, layers)
            return found

        return await asyncio.to_thread(find)

    async def _erase_in_forks(self, entry: Entry, receipt: EraseReceipt, rebuild: bool) -> EraseReceipt:
        forks = await asyncio.to_thread(self.cold.catalog.forks, entry.id)
        done: dict[str, str] = {}
        for fork in forks:
            try:
                there = await self.erase(fork.name, inherited(receipt.what, fork.base), rebuild)
            except RaymemError as error:
                # the receipt says that it is not done; a sweep tries again
                log.warning("not erased in a fork", bank=entry.name, fork=fork.name, error=str(error))
                done[fork.name] = ""
            else:
                done |= {fork.name: there.id} if there.rows else {}
        if not forks:
            return receipt
        return await asyncio.to_thread(record_forks, self.cold, receipt, done)

    async def _go_on(self, receipt: EraseReceipt) -> EraseReceipt:
        """Erase in the forks that an erasure has not come to: as it was asked for, the parent having been rewritten."""
        entry = await asyncio.to_thread(self.cold.catalog.by_id, receipt.bank_id)
        if entry is None or receipt.status != "pending" or not receipt.forks:
            return receipt
        return await self._erase_in_forks(entry, receipt, True)

    async def put_params(self, learned: Learned) -> str:
        """Keep weights; return their name.

        Raises:
            InvalidSpec: no bank of their kind could use them.
        """
        return await asyncio.to_thread(self.cold.params.put, learned.check().kind, learned.to_bytes())

    async def params(self, params: str) -> Learned:
        """Weights by their name."""
        return Learned.from_bytes(await asyncio.to_thread(self.cold.params.get, params), params)

    def complete(self, spec: BankSpec) -> BankSpec:
        """A spec that was checked, with the store's calibration if it names none."""
        from raymem.bank.replica import learned_of
        from raymem.encode.encoder import assemble

        fingerprint = spec.fingerprint
        calibrations = self.cold.calibrations
        # the model may have been calibrated under an earlier release's hash of it
        known = (calibrations.find(content, fingerprint.layers) for content in fingerprint.content_hashes())
        calibration = (
            calibrations.sound(fingerprint.calibration) if fingerprint.calibration else next(filter(None, known), None)
        )
        if calibration is None:
            raise _no_calibration(fingerprint.model, fingerprint.layers)
        spec = spec.model_copy(update={"fingerprint": fingerprint.model_copy(update={"calibration": calibration.hash})})
        assemble(spec, calibration, learned_of(self.cold, spec))
        return spec

    def _present(self, entry: Entry, hot: dict[str, int]) -> BankInfo:
        while True:
            try:
                return self._info(entry, hot)
            except (Corrupt, Conflict) as error:
                present = self.cold.catalog.by_id(entry.id)
                if present is not None and present.generation == entry.generation:
                    raise
                if present is None:
                    raise BankNotFound(f"bank {entry.name!r} was removed just now", bank=entry.name) from error
                # its journal is another now
                entry = present

    def _info(self, entry: Entry, hot: dict[str, int]) -> BankInfo:
        journal = self.cold.journal(entry)
        return BankInfo(
            name=entry.name,
            spec=entry.spec,
            state="cold" if entry.state == "cold" else "hot",
            epoch=entry.epoch,
            owner=entry.owner,
            node=self.node_of(entry.owner) if entry.owner else None,
            rows=journal.rows(),
            bytes=hot.get(entry.name, 0),
            tags=entry.tags,
            created=entry.created,
            pinned=bool(entry.pinned),
            ttl_s=entry.ttl_s,
        )


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


def _no_calibration(model: str, layers: tuple[int, ...]) -> CalibrationNotFound:
    numbers = ",".join(map(str, layers))
    return CalibrationNotFound(
        f"no calibration for {model} layers {numbers} in this store; make one: "
        f"`raymem calibrate --model {model} --layers {numbers}`, with the same --store"
    )
