"""The verbs of a store: one call on a bank becomes calls on its parts.

A bank's parts are its partitions; a whole bank is its own only part. This is the one layer that knows about partitions,
under `Store` and over the hosts. A gateway uses the same store, so that its clients make one call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import inspect
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from raymem.bank.held import HeldStates, chosen_layer, fetched
from raymem.bank.merge import merge_banks
from raymem.config import Settings
from raymem.errors import (
    BackendUnavailable,
    BankDetached,
    BankNotFound,
    Conflict,
    Corrupt,
    InvalidInput,
    Overloaded,
    Partitioned,
    RaymemError,
    Reassigned,
    StorageError,
    Unavailable,
    Unsupported,
)
from raymem.host.backend import detached
from raymem.memory import keeps_rows
from raymem.partition.assignment import Assignments
from raymem.partition.content import ContentVerbs
from raymem.partition.gather import combine, merge_memories, merge_readouts, one_receipt
from raymem.partition.rebalance import Mover
from raymem.rows import AttendedRows, Trace
from raymem.storage.catalog import Catalog, part_of, part_prefix
from raymem.storage.export.export import export_bank
from raymem.storage.export.imports import import_bank
from raymem.storage.history import fork_at, moment_of, positions_of, restore_to, tag_end, untag
from raymem.storage.partitions import MOST, Layout
from raymem.storage.store import ColdStore, Entry
from raymem.storage.sweeper import sweep
from raymem.storage.tables.tables import BANK_TABLE
from raymem.types import (
    Ack,
    AttendedExtent,
    AttendQuery,
    BankInfo,
    BankSpec,
    EraseReceipt,
    MemoryTokens,
    MergeReport,
    MigrationReport,
    Readout,
    RebalanceReport,
    RestoreReport,
    Selection,
    SweepReport,
)

B = TypeVar("B", bound=type[Any])
T = TypeVar("T")
# a mover holds a stream's writers for a moment; one that died in it holds them for no longer than this
_HOLD_S = 5.0
_PAUSE_S = 0.01
_TRIES = 20


class _Answers(NamedTuple, Generic[T]):
    """What the parts of a bank answered, by their numbers, as it was laid out then; those that did not are missing."""

    layout: Layout
    found: dict[int, T]
    missing: list[int]


def telling(backend: B) -> B:
    """Wrap a backend's public verbs: where another caller removes a bank in use, they raise BankNotFound or Conflict.

    The tables of a removed bank are missing, as those of a damaged one are; the catalog tells the two apart.
    """

    def wrap(verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        async def told(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return await verb(self, *args, **kwargs)
            except (Corrupt, StorageError) as error:
                why = await asyncio.to_thread(_what_went, self.cold.catalog, error)
                if why is None:
                    raise
                raise why from error

        return told

    for name, verb in list(vars(backend).items()):
        if inspect.iscoroutinefunction(verb) and not name.startswith("_"):
            setattr(backend, name, wrap(verb))
    return backend


def _what_went(catalog: Catalog, error: RaymemError) -> RaymemError | None:
    """The error to raise where another caller removed or rewrote the bank; None if the table is damaged.

    Storage's error names the table, or the path of a file in it.
    """
    for found in BANK_TABLE.finditer(error.message):
        entry = catalog.by_id(found["id"])
        if entry is None:
            return BankNotFound("the bank was removed while it was used: list the banks, or create it again")
        if int(found["generation"] or 0) != entry.generation:
            return Conflict(f"rows of bank {entry.name} were erased or moved while it was used: do it again")
    return None


@telling
class PartitionedBackend(ContentVerbs):
    """Every verb on banks; those on the hosts themselves are left to the kinds of hosts."""

    def __init__(self, cold: ColdStore, settings: Settings) -> None:
        super().__init__(cold, settings)
        self._partitions = cold.partitions
        # of partitioned banks alone
        self._layouts: dict[str, Layout] = {}
        self._assignments = Assignments(cold.partitions)

    async def create(self, name: str, spec: BankSpec, partitions: int) -> BankInfo:
        """Enter a bank in the catalog and attach it.

        Raises:
            CalibrationNotFound: the store has none for the fingerprint's model and layers.
            Unsupported: partitions of a kind that keeps one state.
            InvalidSpec, BankExists: nothing was created.
        """
        if not 1 <= partitions <= MOST:
            raise InvalidInput(f"partitions is {partitions}; a bank has 1 to {MOST}")
        checked = await asyncio.to_thread(self.completed, spec)
        if partitions > 1 and not keeps_rows(spec.kind):
            raise Unsupported(
                f"a {spec.kind} bank is one bounded state that every row changes, so it can't be in {partitions} "
                "partitions; leave partitions out, or create a bank for each stream and merge them"
            )
        await asyncio.to_thread(self._partitions.create, name, checked, partitions)
        return await self.attach(name, None)

    async def info(self, name: str) -> BankInfo:
        """One bank's line, with the keys and values beside its journal."""
        _, parts = await self._look(name)
        hot = await self.hot_bytes() if any(part.state == "hot" for part in parts) else {}
        lines = await asyncio.to_thread(self._lines, parts, hot)
        extents = await asyncio.to_thread(lambda: [self.cold.attended(part).extent() for part in parts])
        counted = [
            dataclasses.replace(line, attended_rows=extent.rows, attended_bytes=extent.bytes)
            for line, extent in zip(lines, extents, strict=True)
        ]
        return counted[0] if counted[0].name == name else combine(name, counted)

    async def banks(self, prefix: str) -> list[BankInfo]:
        """The lines of banks whose names begin with `prefix`, by name."""
        if "." in prefix:
            # as in the names of partitions alone
            return []
        entries = await asyncio.to_thread(self.cold.catalog.list, prefix)
        hot = await self.hot_bytes()
        found: defaultdict[str, dict[int, BankInfo]] = defaultdict(dict)
        for entry in entries:
            bank, index = part_of(entry.name) or (entry.name, -1)
            try:
                if entry.state != "split":
                    (found[bank][index],) = await asyncio.to_thread(self._lines, [entry], hot)
            except BankNotFound:
                # it was there when they were listed
                continue
        return [
            parts[-1] if -1 in parts else combine(bank, [parts[index] for index in sorted(parts)])
            for bank, parts in sorted(found.items())
            if parts
        ]

    async def delete(self, name: str, materialise: bool) -> None:
        """Remove a bank with all its rows, snapshots and tags, whatever they hold: nothing is loaded or saved for it.

        Raises:
            Conflict: it has forks and `materialise` is False, naming them.
        """
        catalog = self.cold.catalog
        line = await asyncio.to_thread(catalog.line, name)
        parts = await asyncio.to_thread(catalog.lines, part_prefix(name)) if line.state == "split" else [line]
        for part in parts if not materialise else []:
            await asyncio.to_thread(catalog.require_no_forks, part)
        for part in parts:
            for fork in await asyncio.to_thread(catalog.forks, part.id) if materialise else []:
                await self.materialise_part(fork.name)
            await asyncio.to_thread(catalog.require_no_forks, part)
            await self.remove_part(part)
        if line not in parts:
            await asyncio.to_thread(self._partitions.drop, line)
            # last: what was cut short before can be asked for again
            await asyncio.to_thread(self.cold.remove, name)
            self._layouts.pop(name, None)

    async def write(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Write a trace, to the part that its stream lives in; the Ack's position counts there."""
        layout = self._layouts.get(name)
        if layout is None:
            try:
                return await self.write_part(name, trace, durable)
            except Partitioned:
                layout = await self._partitioned(name)
        try:
            if (layout.id, trace.stream) not in self._assignments:
                trace.validate(layout.entry.spec.fingerprint)
            return await self._at_home(layout, trace.stream, lambda part: self.write_part(part, trace, durable))
        except BankNotFound:
            # another bank may have the name now
            del self._layouts[name]
            if (await self._look(name))[0] == layout:
                raise
            return await self.write(name, trace, durable)

    async def _at_home(self, layout: Layout, stream: str, call: Callable[[str], Awaitable[T]]) -> T:
        """Call the part that a stream lives in, once it is not just moving."""
        began = time.monotonic()
        while True:
            part = await self._assignments.part_of(layout, stream)
            try:
                return await _as_one(layout.name, call(part))
            except Reassigned:
                waited_s = time.monotonic() - began
                if waited_s > 2 * _HOLD_S:
                    raise
                await self._assignments.look_again(layout, stream, cancel=waited_s > _HOLD_S)
                await asyncio.sleep(_PAUSE_S)

    async def read(
        self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None, allow_partial: bool
    ) -> Readout:
        """Read a bank, or what it was: all parts at once.

        Raises:
            Unavailable: naming the partition that does not answer, unless `allow_partial`; then it is among the
                readout's `missing`.
        """
        layout = self._layouts.get(name)
        if layout is None:
            try:
                return await self.read_part(name, hidden_QLD, k, start, as_of)
            except Partitioned:
                layout = await self._partitioned(name)
        asked = await self._ask_parts(
            layout, lambda part: self.read_part(part, hidden_QLD, k, start, as_of), as_of, allow_partial
        )
        return await asyncio.to_thread(merge_readouts, asked.found, asked.layout.entry.spec, k, asked.missing)

    async def attend(self, name: str, query: AttendQuery, as_of: str | float | None) -> MemoryTokens:
        """Choose the rows of a bank, or of what it was, that a model is to attend to; pieces of all parts compete."""
        layout = self._layouts.get(name)
        if layout is None:
            try:
                return await self.attend_part(name, query, as_of)
            except Partitioned:
                layout = await self._partitioned(name)
        # of most that each chooses the keys and values would be fetched for nothing
        one = dataclasses.replace(query, fetch=False)
        asked = await self._ask_parts(layout, lambda part: self.attend_part(part, one, as_of), as_of, False)

        def together() -> MemoryTokens:
            spec = asked.layout.entry.spec
            calibration = self.cold.calibrations.load(spec.fingerprint.calibration)
            chosen = merge_memories(asked.found, query, HeldStates(calibration, chosen_layer(query, spec.fingerprint)))
            return fetched(self.cold, self._partitions.entries(asked.layout), chosen) if query.fetch else chosen

        return await asyncio.to_thread(together)

    async def put_rows(self, name: str, rows: AttendedRows) -> AttendedExtent:
        """Keep keys and values of rows beside the journal of the part that their stream lives in."""
        layout, _ = await self._look(name)
        if layout.whole:
            return await _as_one(name, self.put_rows_part(name, rows))
        if await asyncio.to_thread(self._partitions.find, layout.id, rows.stream) is None:
            raise InvalidInput(f"stream {rows.stream!r} has no row in bank {name}: write the rows first")
        return await self._at_home(layout, rows.stream, lambda part: self.put_rows_part(part, rows))

    async def _ask_parts(
        self,
        layout: Layout,
        call: Callable[[str], Awaitable[T]],
        as_of: str | float | None,
        allow_partial: bool,
    ) -> _Answers[T]:
        """Ask all parts at once, again where streams moved meanwhile."""
        wait_s = self.settings.host.partial_s if allow_partial else None

        async def ask(part: str) -> T:
            try:
                async with asyncio.timeout(wait_s):
                    return await call(part)
            except TimeoutError:
                raise BackendUnavailable(f"no answer within {wait_s:g} s") from None

        for _ in range(_TRIES):
            if as_of is not None:
                await asyncio.to_thread(self._check_past, layout, as_of)
            answers = await asyncio.gather(*map(ask, layout.parts), return_exceptions=True)
            # a stream that moved meanwhile may have been in neither of two partitions when each was asked
            if await asyncio.to_thread(self._partitions.stands, layout):
                return _answered(layout, answers, allow_partial)
            layout = await self._partitioned(layout.name)
        raise Overloaded(f"streams of bank {layout.name} move faster than it can be read; try again", retry_after_s=1.0)

    def _check_past(self, layout: Layout, as_of: str | float) -> None:
        """Refuse a time before rows were moved, which their new partition had later than they were written."""
        moment = moment_of(self.cold.catalog.get(layout.parts[0]), as_of)
        if moment is not None and moment < layout.moved:
            raise InvalidInput(
                f"streams of bank {layout.name} were moved between its partitions at {layout.moved:.0f}, and what it "
                f"was before, at {moment:.0f}, can't be read any more; tag or export a bank before rebalancing it"
            )

    async def attach(self, name: str, node: str | None) -> BankInfo:
        """Load a bank; of a partitioned one each partition where there is room then."""
        _, parts = await self._look(name)
        # one after the other: each goes where the others left most room
        return await self._info(name, [await self.attach_part(part, node) for part in parts])

    async def detach(self, name: str) -> BankInfo:
        """Flush, snapshot and free a bank."""
        _, parts = await self._look(name)
        hot = _hot(parts)
        if not hot:
            raise detached(name)
        await _as_one(name, asyncio.gather(*map(self.detach_part, hot)))
        return await self.info(name)

    async def migrate(self, name: str, to: str, partition: int | None) -> MigrationReport:
        """Move a bank to another node, or one of its partitions."""
        layout, _ = await self._look(name)
        parts = layout.parts
        if partition is not None:
            if layout.whole or not 0 <= partition < len(parts):
                has = "is not partitioned" if layout.whole else f"has partitions 0 to {len(parts) - 1}"
                raise InvalidInput(f"bank {name} {has}; there is no partition {partition} to migrate")
            parts = (parts[partition],)
        reports = [await _as_one(name, self.migrate_part(part, to)) for part in parts]
        return MigrationReport(
            name,
            ", ".join(sorted({report.source for report in reports})),
            ", ".join(sorted({report.target for report in reports})),
            rows=sum(report.rows for report in reports),
            pause_ms=max(report.pause_ms for report in reports),
            total_ms=sum(report.total_ms for report in reports),
        )

    async def pin(self, name: str, pinned: bool) -> BankInfo:
        """Keep a bank in memory when room is needed, or no longer."""
        layout, _ = await self._look(name)
        for part in layout.parts:
            await asyncio.to_thread(self.cold.catalog.pin, part, pinned)
        return await self.info(name)

    async def set_ttl(self, name: str, ttl_s: float | None) -> BankInfo:
        """Let rows expire that are older than `ttl_s` seconds, or none."""
        _, parts = await self._look(name)
        changed = [await asyncio.to_thread(self.cold.catalog.change, part, ttl_s=ttl_s) for part in parts]
        return await self._info(name, changed)

    async def digest(self, name: str) -> str:
        """sha256 of a bank's state; of a partitioned one of its partitions' digests."""
        layout, _ = await self._look(name)
        asked = (self.ask(part, "digest") for part in layout.parts)
        digests: list[str] = await _as_one(name, asyncio.gather(*asked))
        return digests[0] if layout.whole else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    async def tag(self, name: str, tag: str) -> dict[str, int]:
        """Name the present position, of each part its own, in one commit; return all tags."""
        layout, parts = await self._look(name)
        hot = _hot(parts)
        if hot and not keeps_rows(layout.entry.spec.kind):
            # the owner of a bounded state keeps it there
            tags: dict[str, int] = await self.ask(name, "mark", tag)
            return tags
        # also what was written without waiting
        await asyncio.gather(*(self.ask(part, "release", None) for part in hot))
        return await asyncio.to_thread(tag_end, self.cold, name, tag)

    async def untag(self, name: str, tag: str) -> dict[str, int]:
        """Forget a tag; return those that are left."""
        return await asyncio.to_thread(untag, self.cold, name, tag)

    async def fork(self, source: str, target: str, at: str | int | None) -> BankInfo:
        """Create `target` from the rows that `source` has up to a tag or position; nothing is copied.

        It has as many parts. The fork of an attached bank is attached too, and loads when it is first used.
        """
        await asyncio.to_thread(fork_at, self.cold, source, target, at)
        return await self.info(target)

    async def restore(self, name: str, at: str | int) -> RestoreReport:
        """Go back to a tag or position; what came after stays in a bank of its own, in as many parts."""
        _, parts = await self._look(name)
        hot = _hot(parts)
        # before it is detached
        await asyncio.to_thread(positions_of, self.cold, parts, at)
        await asyncio.gather(*map(self.detach_part, hot))
        try:
            return await asyncio.to_thread(restore_to, self.cold, name, at)
        finally:
            for part in hot:
                await self.attach_part(await asyncio.to_thread(self.cold.catalog.get, part), None)

    async def materialise(self, name: str) -> BankInfo:
        """Give a fork rows of its own, one part after the other; what was cut short goes on."""
        layout, _ = await self._look(name)
        for part in layout.parts:
            await self.materialise_part(part)
        return await self.info(name)

    async def merge(self, target: str, sources: list[str], rebuild: bool, rename: bool) -> MergeReport:
        """Create a bank from the rows of several; it is attached, and loads when it is first used."""
        return await asyncio.to_thread(merge_banks, self.cold, target, sources, rebuild=rebuild, rename=rename)

    async def tokens(self, name: str, stream: str, run: str, seq_from: int, seq_to: int) -> Tensor:
        """Token ids of a run's rows from `seq_from` to `seq_to` (exclusive), in order."""

        def find() -> Tensor:
            while True:
                layout = self._partitions.get(name)
                journal = self.cold.journal(self.cold.catalog.get(self._partitions.part_of(layout, stream)))
                found = journal.tokens(stream, run, seq_from, seq_to)
                if self._partitions.stands(layout):
                    return found

        return await asyncio.to_thread(find)

    async def export(self, name: str, path: Path) -> int:
        """Write a bank to one file; return its bytes."""
        return (await asyncio.to_thread(export_bank, self.cold, name, path)).bytes

    async def import_(self, path: Path, name: str) -> BankInfo:
        """Create a bank from an exported file, checked whole before anything becomes visible; it starts cold."""
        await asyncio.to_thread(import_bank, self.cold, path, name)
        return await self.info(name)

    async def erase(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt:
        """Erase rows; the receipt is that of all parts together."""
        layout, parts = await self._look(name)
        if not layout.whole:
            # a stream on its way stays at home, and no row of it is copied any more
            await asyncio.to_thread(self._partitions.cancel, layout, what.stream)
            for part in _hot(parts):
                await self.ask(part, "release", what.stream)
        receipts = [await self.erase_part(part, what, rebuild) for part in layout.parts]
        return receipts[0] if layout.whole else one_receipt(name, layout.id, receipts)

    async def receipts(self, name: str, forget_names: bool) -> list[EraseReceipt]:
        """The receipts of what was erased in a bank, oldest first; without names in those that are finished."""
        kept = self.cold.receipts
        return await asyncio.to_thread(kept.forget_names if forget_names else kept.of, name)

    async def sweep(self, dry_run: bool) -> SweepReport:
        """Delete what the catalog doesn't name, and finish erasures that were cut short."""
        report = await asyncio.to_thread(sweep, self.cold, self.settings.cold.sweep_age_s, dry_run=dry_run)
        finished = []
        for receipt in report.receipts:
            if receipt.status == "pending" and receipt.forks:
                entry = await asyncio.to_thread(self.cold.catalog.by_id, receipt.bank_id)
                if entry is not None:
                    # in forks as it was asked for: the parent has been rewritten
                    receipt = await self.erase_in_forks(entry, receipt, True)
            finished.append(receipt)
        return dataclasses.replace(report, receipts=tuple(finished))

    async def grow(self, name: str, partitions: int) -> BankInfo:
        """Add empty partitions, to which some of the streams go that come from now on.

        Raises:
            Unsupported: the bank is not partitioned.
        """
        layout, parts = await self._look(name)
        _require_partitions(layout)
        wider = await asyncio.to_thread(self._partitions.grow, layout, partitions)
        added = wider.parts[len(parts) :]
        for part in added if len(_hot(parts)) == len(parts) else ():
            await self.attach_part(await asyncio.to_thread(self.cold.catalog.get, part), None)
        if added:
            await asyncio.to_thread(self._partitions.widen, wider)
        return await self.info(name)

    async def rebalance(self, name: str) -> RebalanceReport:
        """Move streams to where they would go if they came now; see `raymem.partition.rebalance`.

        Raises:
            Unsupported: the bank is not partitioned. Conflict: it has tags or forks, which would lose rows.
        """
        layout, _ = await self._look(name)
        _require_partitions(layout)
        return await _as_one(name, Mover(self, layout).run())

    async def _look(self, name: str) -> tuple[Layout, list[Entry]]:
        """A bank's layout, and what the catalog says of its parts."""
        entry = await asyncio.to_thread(self.cold.catalog.get, name)
        if entry.state != "split":
            self._layouts.pop(name, None)
            return Layout(entry, (name,)), [entry]
        layout = self._layouts[name] = await asyncio.to_thread(self._partitions.of, entry)
        return layout, await asyncio.to_thread(self._partitions.entries, layout)

    async def _partitioned(self, name: str) -> Layout:
        layout, _ = await self._look(name)
        if layout.whole:
            raise Conflict(f"bank {name} was made anew meanwhile, without partitions; try again")
        return layout

    async def _info(self, name: str, parts: Sequence[Entry]) -> BankInfo:
        hot = await self.hot_bytes() if any(part.state == "hot" for part in parts) else {}
        lines = await asyncio.to_thread(self._lines, parts, hot)
        return lines[0] if lines[0].name == name else combine(name, lines)

    def _lines(self, parts: Sequence[Entry], hot: Mapping[str, int]) -> list[BankInfo]:
        """The lines of parts; one that was rewritten meanwhile as it is now."""
        found, left = list[BankInfo](), list(parts)
        while left:
            entry = left.pop(0)
            try:
                rows = self.cold.journal(entry).rows()
            except (Corrupt, Conflict) as error:
                present = self.cold.catalog.by_id(entry.id)
                if present is None:
                    raise BankNotFound(f"bank {entry.name!r} was removed just now", bank=entry.name) from error
                if present.generation == entry.generation:
                    raise
                left.insert(0, present)
                continue
            found.append(
                BankInfo(
                    name=entry.name,
                    spec=entry.spec,
                    state="cold" if entry.state == "cold" else "hot",
                    epoch=entry.epoch,
                    owner=entry.owner,
                    node=self.node_of(entry.owner) if entry.owner else None,
                    rows=rows,
                    bytes=hot.get(entry.name, 0),
                    tags=entry.tags,
                    created=entry.created,
                    pinned=bool(entry.pinned),
                    ttl_s=entry.ttl_s,
                )
            )
        return found


def _hot(parts: Sequence[Entry]) -> list[str]:
    return [part.name for part in parts if part.state == "hot"]


async def _as_one(name: str, work: Awaitable[T]) -> T:
    """Await calls on a bank's parts; an error of a detached part names the bank."""
    try:
        return await work
    except BankDetached:
        raise detached(name) from None


def _answered(layout: Layout, answers: Sequence[T | BaseException], allow_partial: bool) -> _Answers[T]:
    found = {index: answer for index, answer in enumerate(answers) if not isinstance(answer, BaseException)}
    failed = {index: answer for index, answer in enumerate(answers) if isinstance(answer, BaseException)}
    if found and allow_partial and all(isinstance(error, Unavailable) for error in failed.values()):
        return _Answers(layout, found, list(failed))
    for index, error in failed.items():
        if isinstance(error, BankDetached):
            raise detached(layout.name)
        if isinstance(error, Unavailable):
            about = {**error.details, "partition": index}
            raise type(error)(f"partition {index} of bank {layout.name}: {error.message}", **about) from error
        raise error
    return _Answers(layout, found, [])


def _require_partitions(layout: Layout) -> None:
    if layout.whole:
        raise Unsupported(
            f"bank {layout.name} is not partitioned; create one with partitions=N (`raymem bank create --partitions "
            "N`) and write the streams there"
        )
