"""One bank made of several: their rows in one journal, and a state by the rule of their kind."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

import pyarrow as pa

from raymem.bank.replica import Replica
from raymem.errors import InvalidInput, InvalidSpec, Partitioned, RaymemError, Unsupported
from raymem.memory import keeps_rows, merge_rule
from raymem.memory.base import State
from raymem.rows import JournalRows
from raymem.storage.catalog import Moment
from raymem.storage.journal.fork_journal import steady
from raymem.storage.kway_merge import Tally, merged
from raymem.storage.partitions import Layout
from raymem.storage.snapshots import MERGED_TAG
from raymem.storage.store import ColdStore, Entry
from raymem.storage.tables.tables import snapshot_table
from raymem.types import BankSpec, MergeReport, check_bank_name


def merge_banks(cold: ColdStore, target: str, sources: Sequence[str], *, rebuild: bool, rename: bool) -> MergeReport:
    """Create `target` from the rows that the sources have now; it becomes visible whole or not at all.

    Rows are ordered by (time, source, position), a row's time being the latest that its bank has had up to it. With
    `rename`, streams get the bank's name before theirs: `alice/…`, or `research/alice/…` where two namespaces have an
    alice. Without, rows of one name and content are kept once; of those with other content the first source's.

    A state that holds exactly what the rows say is made of them when the bank loads. That of a kind which merges
    approximately is made of the sources' states, and kept under the tag `merged`, unless `rebuild` asks for the rows.

    Raises:
        InvalidInput: no source, or one twice. FingerprintMismatch, InvalidSpec: naming what differs.
        Unsupported: banks of this kind don't merge, and `rebuild` is False.
        Conflict: rows of a source were erased meanwhile.
    """
    entries = [cold.catalog.get(source) for source in sources]
    spec = _common_spec(entries)
    rule = merge_rule(spec.kind)
    with steady(cold.catalog, *entries):
        journals = [cold.journal(entry) for entry in entries]
        ends = [journal.end() for journal in journals]
        given = [end - len(journal.tombstones()) for end, journal in zip(ends, journals, strict=True)]
        state = _merged_state(cold, entries, ends) if rule != "exact" and not rebuild else None
    prefixes = _prefixes(sources) if rename else [""] * len(sources)
    made, tally = Entry(id=uuid.uuid4().hex, name=target, spec=spec, state="hot", created=time.time()), Tally()
    scans = [journal.scan(stop=end) for journal, end in zip(journals, ends, strict=True)]
    tables = _steadily(cold, entries, merged(scans, sources, prefixes, tally))
    try:
        if state is None:
            cold.catalog.add(made, (batch for table in tables for batch in table.to_batches()))
        else:
            # the position is known only when all rows have passed, and the tag must be there with the bank
            made.tags[MERGED_TAG] = sum(given)
            cold.catalog.add(made, _with_state(cold, made, tables, state, tally))
    except BaseException:
        cold.tables.drop(snapshot_table(made.id))
        raise
    return MergeReport(
        bank=target,
        rows=sum(given) - tally.duplicates - tally.conflicts,
        sources=dict(zip(sources, given, strict=True)),
        streams=dict(zip(sources, prefixes, strict=True)),
        rule=rule,
        rebuilt=state is None,
        duplicates=tally.duplicates,
        conflicts=tally.conflicts,
        conflict_rows=tuple(tally.named),
    )


class _Part:
    """A whole bank or a partition of one, as it is when this is made."""

    def __init__(self, cold: ColdStore, name: str, source: str, prefix: str) -> None:
        self.entry = cold.catalog.get(name)
        self.source = source
        self.prefix = prefix
        self._journal = cold.journal(self.entry)
        self.end = self._journal.end()
        self.rows = self.end - len(self._journal.tombstones())

    def scan(self) -> Iterator[JournalRows]:
        return self._journal.scan(stop=self.end)

    def streams(self) -> list[str]:
        return [self.prefix + stream for stream in self._journal.streams(self.end)]


def merge_partitions(
    cold: ColdStore, target: str, sources: Sequence[str], layouts: Sequence[Layout | None], *, rename: bool
) -> MergeReport:
    """As `merge_banks`, of row banks of which some are partitioned: `target` has as many partitions as the largest.

    Whole partitions of the sources come together in one, so that a stream is in one still.

    Args:
        cold: the store.
        target: the new bank.
        sources: the banks.
        layouts: of those that are partitioned.
        rename: must be: streams of one name may live in two places.

    Raises:
        Partitioned: without `rename`. Conflict: streams are being moved. And what `merge_banks` does.
    """
    if not rename:
        raise Partitioned(
            f"streams of one name can't be brought together in {target}, as they may live in two partitions; merge "
            "with rename=True (without --keep-names), or export the banks and merge what is imported"
        )
    spec = _common_spec([cold.catalog.get(source) for source in sources])
    prefixes = _prefixes(sources)
    parts = [
        _Part(cold, name, source, prefix)
        for source, layout, prefix in zip(sources, layouts, prefixes, strict=True)
        for name in ([source] if layout is None else layout.parts)
    ]
    placed = _placed(parts, max(layout.count for layout in layouts if layout is not None))
    # after the ends were read: a stream with a row before them is among these
    homes = {stream: index for index, together in enumerate(placed) for part in together for stream in part.streams()}
    made = cold.partitions.lay_out(check_bank_name(target), spec, len(placed), homes)
    entries = [Entry(uuid.uuid4().hex, name, spec, state="hot", created=time.time()) for name in made.parts]
    tally = Tally()
    journals = {entry.id: _together(cold, each, tally) for entry, each in zip(entries, placed, strict=True)}

    def still(_: Moment, entries: Sequence[Entry]) -> Sequence[Entry]:
        for layout in layouts:
            if layout is not None:
                cold.partitions.require_still(layout)
        return entries

    try:
        cold.catalog.add_together([made.entry(), *entries], journals, revise=still)
    except RaymemError:
        cold.partitions.drop(made.id)
        raise
    given = {source: sum(part.rows for part in parts if part.source == source) for source in sources}
    return MergeReport(
        bank=target,
        rows=sum(given.values()) - tally.duplicates - tally.conflicts,
        sources=given,
        streams=dict(zip(sources, prefixes, strict=True)),
        rule=merge_rule(spec.kind),
        rebuilt=True,
        duplicates=tally.duplicates,
        conflicts=tally.conflicts,
        conflict_rows=tuple(tally.named),
    )


def _placed(parts: Sequence[_Part], count: int) -> list[list[_Part]]:
    """The partitions that come together in each new one: of one source never two, the largest where there is least."""
    placed: list[list[_Part]] = [[] for _ in range(count)]
    for source in dict.fromkeys(part.source for part in parts):
        emptiest = sorted(placed, key=lambda each: sum(part.rows for part in each))
        largest = sorted((part for part in parts if part.source == source), key=lambda part: -part.rows)
        for part, each in zip(largest, emptiest, strict=False):
            each.append(part)
    return placed


def _together(cold: ColdStore, parts: Sequence[_Part], tally: Tally) -> Iterator[pa.RecordBatch]:
    scans, names = [part.scan() for part in parts], [part.source for part in parts]
    tables = merged(scans, names, [part.prefix for part in parts], tally)
    for table in _steadily(cold, [part.entry for part in parts], tables):
        yield from table.to_batches()


def _steadily(cold: ColdStore, entries: Sequence[Entry], tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    # an error after the last table still keeps the new bank from becoming visible
    with steady(cold.catalog, *entries):
        yield from tables


def _common_spec(entries: Sequence[Entry]) -> BankSpec:
    names = [entry.name for entry in entries]
    if not names or len(set(names)) < len(names):
        raise InvalidInput(f"a merge takes different banks, at least one; it got {', '.join(names) or 'none'}")
    first = entries[0].spec
    rows = keeps_rows(first.kind)
    for entry in entries[1:]:
        first.fingerprint.require(entry.spec.fingerprint)
        # fingerprints of one model may be written in two ways
        mine, theirs = (spec.model_dump(exclude={"fingerprint"}) for spec in (first, entry.spec))
        differ = [
            f"{name}: {names[0]} has {mine[name]!r}, {entry.name} has {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name] and not (rows and name == "budget_bytes")
        ]
        if differ:
            raise InvalidSpec(f"these banks can't be merged ({'; '.join(differ)}); merge banks of one spec")
    # nothing that the sources hold need be evicted
    return (
        first.model_copy(update={"budget_bytes": sum(entry.spec.budget_bytes for entry in entries)}) if rows else first
    )


def _merged_state(cold: ColdStore, entries: Sequence[Entry], ends: Sequence[int]) -> State:
    replicas = []
    for entry, end in zip(entries, ends, strict=True):
        replica = Replica(cold, entry)
        replica.recover(upto=end)
        replicas.append(replica)
    memory = replicas[0].memory
    try:
        found = memory.dump(memory.merge([replica.state for replica in replicas]))
    except Unsupported as error:
        raise Unsupported(f"{error.message}: merge with rebuild=True (`raymem bank merge --rebuild`)") from error
    return {f"memory.{name}": tensor for name, tensor in found.items()}


def _with_state(
    cold: ColdStore, made: Entry, tables: Iterator[pa.Table], state: State, tally: Tally
) -> Iterator[pa.RecordBatch]:
    """The rows as they pass, and after the last of them a snapshot: an encoder that has seen them, the merged state."""
    replica = Replica(cold, made)
    pos = 0
    for table in tables:
        for rows in JournalRows.from_arrow(table):
            replica.encoder.push(rows)
        pos += len(table)
        yield from table.to_batches()
    if tally.duplicates or tally.conflicts:
        raise InvalidInput(
            f"{tally.duplicates + tally.conflicts} rows are in more than one of these banks, and their states can't be "
            "told apart by row: merge with rebuild=True, or give their streams names of their own (rename=True)"
        )
    tensors, meta = replica.encoder.dump()
    tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()} | state
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    cold.snapshots(made).save(pos, whole, {"encoder": meta})


def _prefixes(sources: Sequence[str]) -> list[str]:
    banks = [source.partition("/")[2] for source in sources]
    return [f"{name}/" for name in (banks if len(set(banks)) == len(banks) else sources)]
