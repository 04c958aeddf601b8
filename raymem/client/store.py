"""The public face: `connect()` gives a Store, a Store gives Banks; written once, async, with a blocking face."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator
from torch import Tensor

from raymem.client.addresses import check_address, open_backend
from raymem.client.blocking import Closes, Loop
from raymem.client.handle import Handle
from raymem.config import Settings
from raymem.encode.calibration import Calibration
from raymem.errors import InvalidTrace
from raymem.host.backend import Backend
from raymem.inputs import (
    AnyAsOf,
    AnyMoment,
    BankName,
    BankNames,
    Count,
    FilePath,
    Flag,
    Label,
    Layers,
    Lifetime,
    Neighbours,
    Partitions,
    Place,
    Prefix,
    TargetPath,
    checked,
    instance,
    shown,
)
from raymem.memory.learned import Learned
from raymem.tensors import states
from raymem.types import (
    DTYPES,
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
    check_spec,
)

_Spec = Annotated[BankSpec, BeforeValidator(check_spec)]
_Calibration = Annotated[Calibration, BeforeValidator(instance(Calibration))]
_Learned = Annotated[Learned, BeforeValidator(instance(Learned))]


def connect(
    uri: str | Path, *, cold: str | None = None, api_key: str | None = None, settings: Settings | None = None
) -> Store:
    """Open memory.

    Args:
        uri: a folder or object-store address (banks in this process), `"ray"` or `ray://host:port` (shards are actors
            of that Ray cluster), or `http://…` / `https://…` (through a gateway).
        cold: with Ray, the cold store that all nodes share.
        api_key: with HTTP, the key to send.
        settings: limits and sizes; read from file and environment by default.

    Raises:
        ConfigError: arguments that don't go together. BackendUnavailable: no Ray cluster or gateway there.
    """
    loop = Loop()
    try:
        store = loop.run(AsyncStore.connect(uri, cold=cold, api_key=api_key, settings=settings))
    except BaseException:
        loop.close()
        raise
    return Store(store, loop)


@checked
class AsyncStore:
    """Named memory banks, wherever they live; see `connect` for the addresses."""

    def __init__(self, backend: Backend) -> None:
        self._handle = Handle(backend)

    @property
    def backend(self) -> Backend:
        """What it works through; StoreClosed is raised where it can't be used, see `Handle`."""
        return self._handle.backend

    @classmethod
    async def connect(
        cls, uri: str | Path, *, cold: str | None = None, api_key: str | None = None, settings: Settings | None = None
    ) -> AsyncStore:
        """As `raymem.connect`, on the running event loop."""
        address = check_address(uri, cold, api_key, settings)
        return cls(await open_backend(address, cold, api_key, settings or Settings.load()))

    async def create(self, name: BankName, spec: _Spec, *, partitions: Partitions = 1) -> AsyncBank:
        """Create a bank and attach it.

        Args:
            name: namespace/name.
            spec: what the bank is.
            partitions: over so many shards its rows are spread, a stream in one; each has the budget of the spec.

        Raises:
            InvalidName, InvalidSpec, BankExists, CalibrationNotFound: nothing was created.
            Unsupported: partitions of a kind that keeps no rows.
        """
        await self.backend.create(name, spec, partitions)
        return AsyncBank(self._handle, name)

    def bank(self, name: BankName) -> AsyncBank:
        """A handle on a bank; it is looked up on first use."""
        return AsyncBank(self._handle, name)

    async def banks(self, prefix: Prefix = "") -> list[BankInfo]:
        """The catalog, by name; `prefix` may be a namespace with its slash."""
        return await self.backend.banks(prefix)

    async def delete(self, name: BankName, *, materialise: Flag = False) -> None:
        """Remove a bank with all its rows, snapshots and tags; its forks keep what they have with `materialise`.

        Raises:
            Conflict: it has forks, which read its rows, and `materialise` is False.
        """
        await self.backend.delete(name, materialise)

    async def fork(self, source: BankName, target: BankName, at: Place | None = None) -> AsyncBank:
        """Create a bank that begins with another's rows, up to a tag or position; no row is copied.

        It is attached if the source is, and goes its own way from there.

        Args:
            source: the bank to begin with; it may be written meanwhile, and may be a fork.
            target: the new bank's name.
            at: a tag or a position; the present position by default.

        Raises:
            BankExists, BankNotFound, TagNotFound, InvalidInput: nothing was created.
        """
        await self.backend.fork(source, target, at)
        return AsyncBank(self._handle, target)

    async def merge(
        self, target: BankName, sources: BankNames, *, rebuild: Flag = False, rename: Flag = True
    ) -> MergeReport:
        """Create a bank from the rows that several have now, in the order of their times.

        Args:
            target: the new bank's name.
            sources: banks of one spec; row kinds may differ in budget, and the new bank gets the sum.
            rebuild: make the state of the rows also where the kind could merge the states; some kinds need it.
            rename: put each bank's name before its streams (`alice/…`). Without, rows under the same name and with the
                same content are kept once, and of those with other content the first bank's: the report says which.

        Raises:
            Unsupported: banks of this kind don't merge without `rebuild`, and why.
            FingerprintMismatch, InvalidSpec: naming what differs. BankExists, BankNotFound: nothing was created.
        """
        return await self.backend.merge(target, list(sources), rebuild, rename)

    async def import_(self, path: FilePath, name: BankName) -> AsyncBank:
        """Create a bank from an exported file; it starts detached.

        Raises:
            Corrupt: the file is damaged or cut short; nothing was created.
        """
        await self.backend.import_(Path(path), name)
        return AsyncBank(self._handle, name)

    async def sweep(self, *, dry_run: Flag = False) -> SweepReport:
        """Delete tables that the catalog doesn't name, once they are old enough, and finish erasures cut short.

        Owners do so by themselves now and then.
        """
        return await self.backend.sweep(dry_run)

    async def put_calibration(self, calibration: _Calibration) -> str:
        """Keep a calibration in the store; return its hash."""
        return await self.backend.put_calibration(calibration)

    async def calibration(self, content: Label, layers: Layers) -> Calibration:
        """The store's calibration for a model's content hash and layers.

        Raises:
            CalibrationNotFound: naming the command that makes one.
        """
        return await self.backend.calibration(content, tuple(layers))

    async def put_params(self, learned: _Learned) -> str:
        """Keep weights that were trained elsewhere; return their name, `sha256:…`, for `BankSpec.params`."""
        return await self.backend.put_params(learned)

    async def params(self, params: Label) -> Learned:
        """The weights of that name.

        Raises:
            NotFound, Corrupt: the store has none, or their bytes don't have that hash.
        """
        return await self.backend.params(params)

    async def nodes(self) -> list[str]:
        """Where banks can live."""
        return await self.backend.nodes()

    async def shards(self) -> list[ShardInfo]:
        """The processes that banks are hot in, and the room each has."""
        return await self.backend.shards()

    async def drain(self, node: Label, *, undo: Flag = False) -> DrainReport:
        """Move every bank away from a node, live; it takes no new ones until this is called with `undo`.

        Raises:
            InvalidInput: there is no such node. Conflict: no other node can take its banks.
        """
        return await self.backend.drain(node, undo)

    async def stats(self) -> dict[str, Any]:
        """Counters of the backend, its shards and their banks."""
        return await self.backend.stats()

    async def close(self) -> None:
        """Let go: a local store settles its banks, other backends just disconnect. Closing twice is fine.

        Raises:
            StorageError: rows that were accepted with `durable=False` could not be written; all else was let go.
        """
        await self._handle.close()


@checked
class AsyncBank:
    """A handle on one bank."""

    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self.name = name

    @property
    def _backend(self) -> Backend:
        return self._handle.backend

    async def info(self) -> BankInfo:
        """The bank's line in the catalog, with its size if it is hot."""
        return await self._backend.info(self.name)

    async def write(self, trace: Trace, *, durable: Flag = True) -> Ack:
        """Write a trace; it is durable when this returns, unless `durable=False`.

        Raises:
            InvalidTrace, NonFinite, SequenceConflict, BankDetached, Overloaded, StorageError: nothing was written.
        """
        if not isinstance(trace, Trace):
            raise InvalidTrace(f"trace is {shown(trace)}; give a raymem.Trace")
        given = trace.checked(await self._dtype(trace.hidden))
        if not durable:
            self._handle.keep()
        return await self._backend.write(self.name, given, durable)

    async def read(
        self,
        queries: Tensor,
        k: Neighbours = 32,
        *,
        start: Count = 1,
        as_of: AnyAsOf = None,
        allow_partial: Flag = False,
    ) -> Readout:
        """Read with Q consecutive hidden states [Q, L, D] of one context.

        Args:
            queries: in the fingerprint's layers and dtype.
            k: neighbours or candidates a query.
            start: position of the first in its context; the state at position 0 is an attention sink and finds nothing.
            as_of: read what the bank was at a tag or a time: seconds since 1970, a datetime or ISO 8601. At a time it
                had all rows before the first that was stamped later.
            allow_partial: take an answer without those partitions that don't give theirs in time, `Readout.missing`.
        """
        asked = states("queries", queries, await self._dtype(queries))
        return await self._backend.read(self.name, asked, k, start, cast(str | float | None, as_of), allow_partial)

    async def attach(self, node: Label | None = None) -> BankInfo:
        """Load the bank from the cold store, on `node` if named."""
        return await self._backend.attach(self.name, node)

    async def detach(self) -> BankInfo:
        """Settle the bank, write its state down, free its memory."""
        return await self._backend.detach(self.name)

    async def migrate(self, to: Label, *, partition: Count | None = None) -> MigrationReport:
        """Move the bank to another node while it is read, or one of its partitions."""
        return await self._backend.migrate(self.name, to, partition)

    async def grow(self, partitions: Partitions) -> BankInfo:
        """Add empty partitions, until there are so many; no stream moves, and new ones go where there are fewest."""
        return await self._backend.grow(self.name, partitions)

    async def rebalance(self) -> RebalanceReport:
        """Move streams to the partitions where they would go now, while they are read and written.

        Each one's writes wait while it is handed over. What was cut short is finished by the next call.

        Raises:
            Conflict: the bank has tags or forks. Unsupported: the bank is not partitioned.
        """
        return await self._backend.rebalance(self.name)

    async def pin(self) -> BankInfo:
        """Keep the bank in memory when its shard needs room; others go first anyway if they were used longer ago."""
        return await self._backend.pin(self.name, True)

    async def unpin(self) -> BankInfo:
        """Let the bank leave memory when its shard needs room; it comes back at its next use."""
        return await self._backend.pin(self.name, False)

    async def tag(self, tag: Label) -> dict[str, int]:
        """Name the present position; return all tags."""
        return await self._backend.tag(self.name, tag)

    async def tags(self) -> dict[str, int]:
        """All tags and their positions."""
        return (await self.info()).tags

    async def untag(self, tag: Label) -> dict[str, int]:
        """Forget a tag; return those that are left.

        Raises:
            TagNotFound: naming the tags there are.
        """
        return await self._backend.untag(self.name, tag)

    async def restore(self, at: Place) -> RestoreReport:
        """Go back to a tag or a position.

        Nothing is lost: what came after stays in a bank of its own, which the report names, and this one becomes its
        fork. Writers are held off meanwhile.

        Raises:
            TagNotFound, InvalidInput: there is no such tag or position; nothing was changed.
        """
        return await self._backend.restore(self.name, at)

    async def materialise(self) -> BankInfo:
        """Copy what this fork inherited into its own journal, so that it needs its parent no more."""
        return await self._backend.materialise(self.name)

    async def digest(self) -> str:
        """sha256 of the bank's whole state; equal digests mean byte-identical states."""
        return await self._backend.digest(self.name)

    async def tokens(self, stream: Label, run: Label, seq_from: Count, seq_to: Count) -> Tensor:
        """Token ids [T] int64 of a run's rows in [seq_from, seq_to), in order; absent ones are left out.

        Works on a detached bank too.
        """
        return await self._backend.tokens(self.name, stream, run, seq_from, seq_to)

    async def export(self, path: TargetPath) -> int:
        """Write the bank to one file; return its bytes."""
        return await self._backend.export(self.name, Path(path))

    async def erase(
        self,
        *,
        stream: Label | None = None,
        run: Label | None = None,
        seq_from: Count | None = None,
        seq_to: Count | None = None,
        before: AnyMoment | None = None,
        scope: Literal["rows", "run"] = "rows",
        rebuild: Flag = False,
    ) -> EraseReceipt:
        """Erase the rows for which all that is given holds, for good: a stream, a run, a few rows, what is old.

        Args:
            stream: whose rows.
            run: only this run's.
            seq_from: only rows of the run from this one on.
            seq_to: and before this one.
            before: only rows of traces older than this, in seconds since the epoch.
            scope: "run", also later rows of the same runs, whose states have traces of these; the receipt counts them.
            rebuild: go on for kinds that can't take rows out of their state: it is replayed from the rows that stay.

        Raises:
            Unsupported: such a kind, without `rebuild`; nothing was changed. InvalidInput: nothing selected.
        """
        what = Selection(stream, run, seq_from, seq_to, cast(float | None, before), scope)
        return await self._backend.erase(self.name, what.check(), rebuild)

    async def receipts(self, *, forget_names: Flag = False) -> list[EraseReceipt]:
        """The receipts of erasures here, oldest first; `forget_names` leaves digests of names in finished ones."""
        return await self._backend.receipts(self.name, forget_names)

    async def set_ttl(self, ttl_s: Lifetime) -> BankInfo:
        """Let rows expire that are older than `ttl_s` seconds, or none; the owner erases them in batches."""
        return await self._backend.set_ttl(self.name, ttl_s)

    async def _dtype(self, given: object) -> torch.dtype:
        # a tensor has one of its own, and is taken with it or not at all
        return torch.float32 if isinstance(given, Tensor) else DTYPES[(await self.info()).spec.fingerprint.dtype]


class Store(Closes):
    """The blocking face of AsyncStore, for scripts and threads; a context manager that closes itself."""

    def __init__(self, store: AsyncStore, loop: Loop) -> None:
        self._store = store
        self._loop = loop
        loop.close_with(store.close)

    def create(self, name: str, spec: BankSpec, *, partitions: int = 1) -> Bank:
        """As `AsyncStore.create`."""
        return Bank(self._loop.run(self._store.create(name, spec, partitions=partitions)), self._loop)

    def bank(self, name: str) -> Bank:
        """As `AsyncStore.bank`."""
        return Bank(self._store.bank(name), self._loop)

    def banks(self, prefix: str = "") -> list[BankInfo]:
        """As `AsyncStore.banks`."""
        return self._loop.run(self._store.banks(prefix))

    def delete(self, name: str, *, materialise: bool = False) -> None:
        """As `AsyncStore.delete`."""
        self._loop.run(self._store.delete(name, materialise=materialise))

    def fork(self, source: str, target: str, at: str | int | None = None) -> Bank:
        """As `AsyncStore.fork`."""
        return Bank(self._loop.run(self._store.fork(source, target, at)), self._loop)

    def merge(self, target: str, sources: Sequence[str], *, rebuild: bool = False, rename: bool = True) -> MergeReport:
        """As `AsyncStore.merge`."""
        return self._loop.run(self._store.merge(target, sources, rebuild=rebuild, rename=rename))

    def import_(self, path: str | Path, name: str) -> Bank:
        """As `AsyncStore.import_`."""
        return Bank(self._loop.run(self._store.import_(path, name)), self._loop)

    def sweep(self, *, dry_run: bool = False) -> SweepReport:
        """As `AsyncStore.sweep`."""
        return self._loop.run(self._store.sweep(dry_run=dry_run))

    def put_calibration(self, calibration: Calibration) -> str:
        """As `AsyncStore.put_calibration`."""
        return self._loop.run(self._store.put_calibration(calibration))

    def calibration(self, content: str, layers: tuple[int, ...]) -> Calibration:
        """As `AsyncStore.calibration`."""
        return self._loop.run(self._store.calibration(content, layers))

    def put_params(self, learned: Learned) -> str:
        """As `AsyncStore.put_params`."""
        return self._loop.run(self._store.put_params(learned))

    def params(self, params: str) -> Learned:
        """As `AsyncStore.params`."""
        return self._loop.run(self._store.params(params))

    def nodes(self) -> list[str]:
        """As `AsyncStore.nodes`."""
        return self._loop.run(self._store.nodes())

    def shards(self) -> list[ShardInfo]:
        """As `AsyncStore.shards`."""
        return self._loop.run(self._store.shards())

    def drain(self, node: str, *, undo: bool = False) -> DrainReport:
        """As `AsyncStore.drain`."""
        return self._loop.run(self._store.drain(node, undo=undo))

    def stats(self) -> dict[str, Any]:
        """As `AsyncStore.stats`."""
        return self._loop.run(self._store.stats())


class Bank:
    """The blocking face of AsyncBank."""

    def __init__(self, bank: AsyncBank, loop: Loop) -> None:
        self._bank = bank
        self._loop = loop
        self.name = bank.name

    def info(self) -> BankInfo:
        """As `AsyncBank.info`."""
        return self._loop.run(self._bank.info())

    def write(self, trace: Trace, *, durable: bool = True) -> Ack:
        """As `AsyncBank.write`."""
        return self._loop.run(self._bank.write(trace, durable=durable))

    def read(
        self,
        queries: Tensor,
        k: int = 32,
        *,
        start: int = 1,
        as_of: str | float | datetime | None = None,
        allow_partial: bool = False,
    ) -> Readout:
        """As `AsyncBank.read`."""
        read = self._bank.read(queries, k, start=start, as_of=as_of, allow_partial=allow_partial)
        return self._loop.run(read)

    def attach(self, node: str | None = None) -> BankInfo:
        """As `AsyncBank.attach`."""
        return self._loop.run(self._bank.attach(node))

    def detach(self) -> BankInfo:
        """As `AsyncBank.detach`."""
        return self._loop.run(self._bank.detach())

    def migrate(self, to: str, *, partition: int | None = None) -> MigrationReport:
        """As `AsyncBank.migrate`."""
        return self._loop.run(self._bank.migrate(to, partition=partition))

    def grow(self, partitions: int) -> BankInfo:
        """As `AsyncBank.grow`."""
        return self._loop.run(self._bank.grow(partitions))

    def rebalance(self) -> RebalanceReport:
        """As `AsyncBank.rebalance`."""
        return self._loop.run(self._bank.rebalance())

    def pin(self) -> BankInfo:
        """As `AsyncBank.pin`."""
        return self._loop.run(self._bank.pin())

    def unpin(self) -> BankInfo:
        """As `AsyncBank.unpin`."""
        return self._loop.run(self._bank.unpin())

    def tag(self, tag: str) -> dict[str, int]:
        """As `AsyncBank.tag`."""
        return self._loop.run(self._bank.tag(tag))

    def tags(self) -> dict[str, int]:
        """As `AsyncBank.tags`."""
        return self._loop.run(self._bank.tags())

    def untag(self, tag: str) -> dict[str, int]:
        """As `AsyncBank.untag`."""
        return self._loop.run(self._bank.untag(tag))

    def restore(self, at: str | int) -> RestoreReport:
        """As `AsyncBank.restore`."""
        return self._loop.run(self._bank.restore(at))

    def materialise(self) -> BankInfo:
        """As `AsyncBank.materialise`."""
        return self._loop.run(self._bank.materialise())

    def digest(self) -> str:
        """As `AsyncBank.digest`."""
        return self._loop.run(self._bank.digest())

    def tokens(self, stream: str, run: str, seq_from: int, seq_to: int) -> Tensor:
        """As `AsyncBank.tokens`."""
        return self._loop.run(self._bank.tokens(stream, run, seq_from, seq_to))

    def export(self, path: str | Path) -> int:
        """As `AsyncBank.export`."""
        return self._loop.run(self._bank.export(path))

    def erase(
        self,
        *,
        stream: str | None = None,
        run: str | None = None,
        seq_from: int | None = None,
        seq_to: int | None = None,
        before: float | None = None,
        scope: Literal["rows", "run"] = "rows",
        rebuild: bool = False,
    ) -> EraseReceipt:
        """As `AsyncBank.erase`."""
        what = {"stream": stream, "run": run, "seq_from": seq_from, "seq_to": seq_to, "before": before}
        return self._loop.run(self._bank.erase(**what, scope=scope, rebuild=rebuild))  # type: ignore[arg-type]

    def receipts(self, *, forget_names: bool = False) -> list[EraseReceipt]:
        """As `AsyncBank.receipts`."""
        return self._loop.run(self._bank.receipts(forget_names=forget_names))

    def set_ttl(self, ttl_s: float | None) -> BankInfo:
        """As `AsyncBank.set_ttl`."""
        return self._loop.run(self._bank.set_ttl(ttl_s))
