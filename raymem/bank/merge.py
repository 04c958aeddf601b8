"""One bank made of several: their rows in one journal, and a state by the rule of their kind."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

import pyarrow as pa

from raymem.bank.replica import Replica
from raymem.errors import InvalidInput, InvalidSpec, Partitioned, Unsupported
from raymem.memory import keeps_rows, merge_rule
from raymem.memory.base import State
from raymem.rows import JournalRows
from raymem.storage.catalog import bank_of
from raymem.storage.journal.fork_journal import steady
from raymem.storage.kway_merge import Tally, merged
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

    `target` has as many parts as the source with the most. Whole parts of the sources come together in one, so that a
    stream stays in one part.

    Raises:
        InvalidInput: no source, or one twice. FingerprintMismatch, InvalidSpec: naming what differs.
        Unsupported: banks of this kind don't merge, and `rebuild` is False.
        Partitioned: a source is, and `rename` is False. Conflict: rows of a source were erased meanwhile, or streams of
            it are being moved.
    """
    layouts = [cold.partitions.get(source) for source in sources]
    if not rename and not all(layout.whole for layout in layouts):
        raise Partitioned(
            f"streams of one name can't be brought together in {target}, as they may live in two partitions; merge "
            "with rename=True (without --keep-names), or export the banks and merge what is imported"
        )
    spec = _common_spec([layout.entry for layout in layouts])
    rule, prefixes = merge_rule(spec.kind), _prefixes(sources) if rename else [""] * len(sources)
    found = [
        (entry, source)
        for layout, source in zip(layouts, prefixes, strict=True)
        for entry in cold.partitions.entries(layout)
    ]
    with steady(cold.catalog, *(entry for entry, _ in found)):
        parts = [_SourcePart(cold, entry, prefix) for entry, prefix in found]
        state = _merged_state(cold, parts) if rule != "exact" and not rebuild else None
    placed = _placed(parts, max(len(layout.parts) for layout in layouts))
    # after the ends were read: a stream with a row before them is among these
    numbered = enumerate(placed) if len(placed) > 1 else ()
    homes = {stream: index for index, each in numbered for part in each for stream in part.streams()}
    layout = cold.partitions.lay_out(check_bank_name(target), spec, len(placed), homes)
    entries = [Entry(uuid.uuid4().hex, name, spec, state="hot", created=time.time()) for name in layout.parts]
    given, tally = {source: 0 for source in sources}, Tally()
    for part in parts:
        given[bank_of(part.entry.name)] += part.rows
    journals = {entry.id: _together(cold, each, tally) for entry, each in zip(entries, placed, strict=True)}
    if state is not None:
        # the position is known only when all rows have passed, and the tag must be there with the bank
        entries[0].tags[MERGED_TAG] = sum(given.values())
        journals[entries[0].id] = _with_state(cold, entries[0], journals[entries[0].id], state, tally)
    try:
        cold.partitions.add(layout, entries, layouts, journals)
    except BaseException:
        for entry in entries:
            cold.tables.drop(snapshot_table(entry.id))
        raise
    return MergeReport(
        bank=target,
        rows=sum(given.values()) - tally.duplicates - tally.conflicts,
        sources=given,
        streams=dict(zip(sources, prefixes, strict=True)),
        rule=rule,
        rebuilt=state is None,
        duplicates=tally.duplicates,
        conflicts=tally.conflicts,
        conflict_rows=tuple(tally.named),
    )


class _SourcePart:
    """A part of a source, as it is when this is made."""

    def __init__(self, cold: ColdStore, entry: Entry, prefix: str) -> None:
        self.entry = entry
        self.prefix = prefix
        self._journal = cold.journal(entry)
        self.end = self._journal.end()
        self.rows = self.end - len(self._journal.tombstones())

    def scan(self) -> Iterator[JournalRows]:
        return self._journal.scan(stop=self.end)

    def streams(self) -> list[str]:
        return [self.prefix + stream for stream in self._journal.streams(self.end)]


def _placed(parts: Sequence[_SourcePart], count: int) -> list[list[_SourcePart]]:
    """The parts that come together in each new one: of one source never two, the largest where there is least."""
    placed: list[list[_SourcePart]] = [[] for _ in range(count)]
    for source in dict.fromkeys(bank_of(part.entry.name) for part in parts):
        emptiest = sorted(placed, key=lambda each: sum(part.rows for part in each))
        largest = sorted((part for part in parts if bank_of(part.entry.name) == source), key=lambda part: -part.rows)
        for part, each in zip(largest, emptiest, strict=False):
            each.append(part)
    return placed


def _together(cold: ColdStore, parts: Sequence[_SourcePart], tally: Tally) -> Iterator[pa.RecordBatch]:
    scans, names = [part.scan() for part in parts], [bank_of(part.entry.name) for part in parts]
    # an error after the last table still keeps the new bank from becoming visible
    with steady(cold.catalog, *(part.entry for part in parts)):
        for table in merged(scans, names, [part.prefix for part in parts], tally):
            yield from table.to_batches()


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


def _merged_state(cold: ColdStore, parts: Sequence[_SourcePart]) -> State:
    replicas = [Replica(cold, part.entry) for part in parts]
    for replica, part in zip(replicas, parts, strict=True):
        replica.recover(upto=part.end)
    memory = replicas[0].memory
    try:
        found = memory.dump(memory.merge([replica.state for replica in replicas]))
    except Unsupported as error:
        raise Unsupported(f"{error.message}: merge with rebuild=True (`raymem bank merge --rebuild`)") from error
    return {f"memory.{name}": tensor for name, tensor in found.items()}


def _with_state(
    cold: ColdStore, made: Entry, journal: Iterator[pa.RecordBatch], state: State, tally: Tally
) -> Iterator[pa.RecordBatch]:
    """The rows as they pass, and after the last of them a snapshot: an encoder that has seen them, the merged state."""
    replica = Replica(cold, made)
    pos = 0
    for batch in journal:
        for rows in JournalRows.from_arrow(pa.Table.from_batches([batch])):
            replica.encoder.push(rows)
        pos += len(batch)
        yield batch
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
