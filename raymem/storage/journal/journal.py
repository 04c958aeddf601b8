"""A bank's journal: the durable, ordered record of the rows that it accepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raymem.errors import BankNotFound, Corrupt, Overloaded, StorageError
from raymem.inputs import TIME_END, composed
from raymem.rows import JournalRows
from raymem.storage.catalog import Catalog, Entry
from raymem.storage.journal.log import Log, OldLogs, read_log
from raymem.storage.journal.tombstones import NO_TOMBSTONES, TOMBSTONES, Tombstones, bank_schema
from raymem.storage.spellings import alike, has_others, same
from raymem.storage.tables.disk import reading
from raymem.storage.tables.single_writer_table import SingleWriterTable, WriterState
from raymem.storage.tables.tables import Tables, in_memory, journal_table, quote
from raymem.types import DTYPES

T = TypeVar("T")
_NAMES = ["pos", "stream", "run", "seq"]
_COMPACT_EVERY = 128
_FRAGMENT_BYTES = 64 * 2**20
# compaction has fallen behind: from here on a writer waits for it, and from there on it is refused
_SLOW_FRAGMENTS = 1_000
_MAX_FRAGMENTS = 1_400
_RETRY_S = 1.0


class _RunRange(NamedTuple):
    """Rows of a run, by its exact name or any spelling: seq in [seq_from, seq_to), before `stop` if there is one."""

    stream: str
    run: str
    seq_from: int
    seq_to: int
    stop: int | None
    spelled: bool = False

    @property
    def filter(self) -> str:
        """The rows as an SQL condition; of any spelling there may be more, for `names` to tell apart."""
        where = f"stream = {quote(self.stream)} AND run = {quote(self.run)}"
        if self.spelled:
            where = f"{alike('stream', self.stream)} AND {alike('run', self.run)}"
        where = f"{where} AND seq >= {self.seq_from} AND seq < {self.seq_to}"
        return where if self.stop is None else f"{where} AND pos < {self.stop}"

    def of(self, rows: JournalRows, values_T: Tensor) -> Iterator[tuple[int, int]]:
        """The seq and the value of each of these rows that belongs here."""
        rows = rows.until(self.stop)
        named = zip(rows.streams, rows.runs, rows.seq_T.tolist(), values_T[: len(rows)].tolist(), strict=True)
        for stream, run, seq, value in named:
            if self.names(stream, run) and self.seq_from <= seq < self.seq_to:
                yield seq, value

    def names(self, stream: str, run: str) -> bool:
        """Whether these are the run's stream and name."""
        if self.spelled:
            return same(stream, self.stream) and same(run, self.run)
        return (stream, run) == (self.stream, self.run)


class JournalReader:
    """One bank's table for reading; every look opens the latest version and works for anyone."""

    def __init__(self, tables: Tables, entry: Entry) -> None:
        self._tables = tables
        self.entry = entry
        self._name = journal_table(entry.id, entry.generation)

    def extent(self) -> tuple[int, int]:
        """The position after the last one that was flushed or erased, and how many rows there are, of one version.

        Raises:
            Corrupt: rows are missing.
        """
        table = self._tables.open(self._name)
        tombstones = self.tombstones(table)
        with reading(f"find the end of the journal of {self.entry.name}"):
            rows = int(table.count_rows())
            last = table.search().select(["pos"]).offset(rows - 1).limit(1).to_arrow()["pos"] if rows else []
        # of a journal whose last rows were erased, the next row still gets a position of its own; a fork begins at its
        # base
        end: int = max(tombstones.end, last[0].as_py() + 1 if rows else self.entry.base)
        wanted = end - self.entry.base
        if tombstones is not NO_TOMBSTONES:
            wanted = int(np.diff(tombstones.rank(np.array([self.entry.base, end])))[0])
        if rows != wanted:
            raise Corrupt(
                f"the journal of {self.entry.name} holds {rows} rows but ends at position {end}, of which "
                f"{len(tombstones)} were erased; restore the bank from an export or a copy of the store",
                pos=end,
            )
        return end, rows

    def tombstones(self, table: Any = None) -> Tombstones:
        """The positions whose rows were erased."""
        with reading(f"open the journal of {self.entry.name}"):
            table = self._tables.open(self._name) if table is None else table
            text = (table.schema.metadata or {}).get(TOMBSTONES)
        return NO_TOMBSTONES if text is None else Tombstones.decode(text)

    def select(self, where: str, columns: list[str], limit: int | None = None) -> dict[str, list[Any]]:
        """Columns of the rows for which an SQL condition holds, or of the first ones."""
        found = self.columns(where, columns, limit)
        return {name: found[name].to_pylist() for name in columns}

    def columns(self, where: str, columns: list[str], limit: int | None = None) -> pa.Table:
        """As `select`, as Arrow."""
        with reading(f"search the journal of {self.entry.name}"):
            query = self._tables.open(self._name).search().where(where).select(columns).limit(limit)
            return query.to_arrow().select(columns)

    def of_stream(self, stream: str, start: int, batch_rows: int = 4096) -> Iterator[JournalRows]:
        """A stream's rows of one version, however spelled, from position `start` on, in order, checked."""
        with reading(f"read a stream in the journal of {self.entry.name}"):
            query = self._tables.open(self._name).search().where(f"{alike('stream', stream)} AND pos >= {start}")
            batches = iter(query.to_batches(batch_rows))
        while True:
            with reading(f"read a stream in the journal of {self.entry.name}"):
                pieces = self._pieces(_take(batches, batch_rows))
            if not pieces:
                return
            for rows in pieces:
                picked = [row for row, name in enumerate(rows.streams) if same(name, stream)]
                yield from [rows.pick(picked).verify()] if picked else []

    def scan(self, start: int, stop: int | None, batch_rows: int) -> Iterator[JournalRows]:
        """Rows of one version from position `start` up to `stop` in order, checked.

        Raises:
            Corrupt: naming the position at which a checksum, the order or the file itself did not hold.
        """
        name = self.entry.name
        table = self._tables.open(self._name)
        tombstones = self.tombstones(table)
        start = max(start, self.entry.base)
        # rows lie in order, so that a tail is found by its place in the table: a filter would look at every row
        stops = [] if stop is None else [max(start, stop)]
        first, *last = np.diff(tombstones.rank(np.array([self.entry.base, start, *stops]))).cumsum().tolist()
        if last == [first]:
            return
        with reading(f"read the journal of {name} from position {start}"):
            query = table.search().offset(first).limit(last[0] - first if last else None)
            batches = iter(query.to_batches(batch_rows))
        expect = start
        while True:
            with reading(f"read the journal of {name} at position {expect}"):
                pieces = self._pieces(_take(batches, batch_rows))
            if not pieces:
                return
            for rows in pieces:
                self.require_order(rows, expect, tombstones)
                expect = int(rows.pos_T[-1]) + 1
                yield rows.verify()

    def require_order(self, rows: JournalRows, expect: int, tombstones: Tombstones) -> None:
        """Raise Corrupt unless these rows are those that follow from position `expect` on."""
        at = tombstones.wrong(rows.pos_T, expect)
        if at is not None:
            wanted = tombstones.next(int(rows.pos_T[at - 1]) + 1 if at else expect)
            raise Corrupt(
                f"the journal of {self.entry.name} has position {int(rows.pos_T[at])} where {wanted} belongs; "
                "restore the bank from an export or a copy of the store",
                pos=wanted,
            )

    def _pieces(self, batches: list[pa.RecordBatch]) -> list[JournalRows]:
        schema = bank_schema(self.entry.spec)
        if batches and not batches[0].schema.equals(schema):
            raise Corrupt(
                f"the journal of {self.entry.name} has another schema than its spec says: {batches[0].schema}; "
                "restore the bank from an export or a copy of the store"
            )
        return JournalRows.from_arrow(pa.Table.from_batches(batches, schema=schema))


class Journal:
    """A bank's rows in the order of `pos`: those in its own table, then those that its owner's log still holds.

    It has one writer, the bank's present owner, whose handle on the table is never refreshed so that a later owner's
    fence stops it. Reading works for anyone: log first, table second, so that rows flushed meanwhile are seen.

    Args:
        tables, catalog, old_logs: the cold store's.
        entry: the bank.
        log: the owner's log for small groups of rows; without one every append goes to the bank's table.
        log_bytes: rows of more bytes than this go straight to the table.
    """

    def __init__(
        self,
        tables: Tables,
        catalog: Catalog,
        entry: Entry,
        old_logs: OldLogs,
        log: Log | None = None,
        log_bytes: int = 2**20,
    ) -> None:
        self.entry = entry
        self.waits = 0
        self._tables = tables
        self._catalog = catalog
        self._old_logs = old_logs
        self._log = log
        self._log_bytes = log_bytes
        self._owned = False
        self._flushed_end = 0
        made_by, name = entry.spec.fingerprint, journal_table(entry.id, entry.generation)
        row_bytes = len(made_by.layers) * made_by.width * DTYPES[made_by.dtype].itemsize
        rows = max(1, _FRAGMENT_BYTES // row_bytes)
        self._writer = SingleWriterTable(tables, name, f"bank {entry.name}", rows)

    def fence(self) -> None:
        """Become the journal's only writer again; see `claim`."""
        self.claim(self.entry, self._log)

    def claim(self, entry: Entry, log: Log | None) -> None:
        """Become the journal's only writer, and flush what an earlier owner's log still holds.

        Args:
            entry: the bank as it was claimed, of the same generation.
            log: the owner's.

        Raises:
            NotOwner: the catalog has moved on from the epoch of this entry.
            Overloaded: another process writes to it all the time.
        """
        self.entry, self._log = entry, log
        self._writer.close()
        self._owned = False
        entry = self._catalog.unchanged(self.entry)
        mine = None if self._log is None else self._log.id
        left: list[JournalRows] = []
        if entry.log is not None and entry.log != mine:
            try:
                left = self._old_logs.rows(entry.log, entry)
            except Corrupt:
                # it is gone if others have the bank by now
                self._catalog.unchanged(entry)
                raise
        self._writer.fence()
        # a newer owner may have fenced before us: then we have just stopped it and must leave the bank to the next
        self._catalog.unchanged(self.entry)
        self._flushed_end, _ = JournalReader(self._tables, entry).extent()
        if left := [rows for part in left if (rows := part.since(self._flushed_end))]:
            self._add(left)
        if entry.log != mine:
            entry = self._catalog.change(entry, log=mine)
        self.entry = entry
        if self._log is not None:
            self._log.flushed(entry.id, self._flushed_end)
        self._owned = True

    @property
    def ready(self) -> bool:
        """Whether this is the journal's writer, as far as it knows."""
        return self._owned and self._writer.state is WriterState.READY

    def accept(self, rows: JournalRows) -> bool:
        """Make sure that these are the next rows; say whether they belong in the log, and not in the bank's table.

        Raises:
            NotOwner: a later owner has fenced. StorageError: the journal does not end where they start because an
            earlier append was cut short: reopen the bank.
        """
        if not (self._owned and self._writer.state is WriterState.READY):
            self.fence()
        logged = None if self._log is None else self._log.end(self.entry.id)
        pos, end = int(rows.pos_T[0]), self._flushed_end if logged is None else logged
        if pos != end:
            raise StorageError(
                f"the journal of {self.entry.name} ends at position {end}, not {pos}: an earlier append was cut "
                "short; reopen the bank and write again, rows that are there already are recognised"
            )
        return self._log is not None and rows.nbytes <= self._log_bytes and not self._log.full

    def append(self, *parts: JournalRows) -> None:
        """Commit rows to the bank's table, with those the log holds before them, all or none; durable when it returns.

        The first append fences. After an error the handle is gone and the next append fences again.

        Raises:
            NotOwner: a later owner has fenced. StorageError: the rows were not accepted; see `accept`. Overloaded: not
            before compaction has caught up.
        """
        parts = tuple(part for part in parts if len(part))
        if parts:
            self.accept(parts[0])
            self.flush(*parts)

    def flush(self, *parts: JournalRows) -> None:
        """Move the rows that the log holds into the bank's table, in one commit with `parts`, which follow them."""
        if not self.ready:
            self.fence()
        held = [] if self._log is None else self._log.rows(self.entry.id)
        if held or parts:
            self._make_room()
            self._add([*held, *parts])
        if self._log is not None:
            self._log.flushed(self.entry.id, self._flushed_end)

    def let_go(self) -> None:
        """Flush, so that the next owner need not read this one's log; a later write fences again."""
        self.flush()
        self._owned = False
        self._writer.close()

    def end(self) -> int:
        """The position that the next row will get."""

        def look() -> int:
            table, left = self._look()
            end, _ = table.extent()
            return max([end, *(int(rows.pos_T[-1]) + 1 for rows in left)])

        return _again(look)

    def counted(self) -> int:
        """The same as its owner counts it since the fence, without a look."""
        logged = None if self._log is None else self._log.end(self.entry.id)
        return self._flushed_end if logged is None else logged

    def rows(self) -> int:
        """How many rows there are; positions are more once rows were erased."""

        def look() -> int:
            table, left = self._look()
            end, rows = table.extent()
            return rows + max([0, *(int(part.pos_T[-1]) + 1 - end for part in left)])

        return _again(look)

    def scan(self, start: int = 0, stop: int | None = None, batch_rows: int = 4096) -> Iterator[JournalRows]:
        """Rows from position `start` up to `stop` in order, checked; rows appended meanwhile may be left out.

        Raises:
            Corrupt: naming the position at which a checksum, the order or the file itself did not hold.
        """
        failed_at = (-1, -1)
        while True:
            try:
                for rows in self._scan(start, stop, batch_rows):
                    yield rows
                    start = int(rows.pos_T[-1]) + 1
                return
            except Corrupt as error:
                # the owner may have compacted the version that we were reading: the latest one has the same rows; or
                # have erased rows, and the table is another one
                place = (start, self._fresh().generation)
                if not error.details.get("missing") or failed_at == place:
                    raise
                failed_at = place

    def of_stream(self, stream: str, start: int = 0) -> Iterator[JournalRows]:
        """A stream's rows from position `start` on, in order, checked; of a journal that is no fork's."""
        table, left = self._look()
        reached = start
        for rows in table.of_stream(stream, start):
            yield rows
            reached = int(rows.pos_T[-1]) + 1
        for part in left:
            rows = part.since(reached)
            picked = [row for row, name in enumerate(rows.streams) if same(name, stream)]
            if picked:
                yield rows.pick(picked).verify()

    def streams(self, stop: int | None = None) -> dict[str, int]:
        """The streams that have rows here before position `stop`, all spellings of one together, and how many."""
        where = "true" if stop is None else f"pos < {stop}"

        def look() -> dict[str, int]:
            table, left = self._look()
            end, _ = table.extent()
            unflushed = [name for rows in left for name in rows.since(end).until(stop).streams]
            counted = Counter(table.select(where, ["stream"])["stream"]) + Counter(unflushed)
            together = Counter[str]()
            for stream, count in counted.items():
                together[composed(stream)] += count
            return dict(together)

        return _again(look)

    def find(self, stream: str, run: str, seq_from: int, seq_to: int, stop: int | None = None) -> dict[int, int]:
        """Checksums by seq of a run's rows in [seq_from, seq_to) that are there already, before position `stop`."""
        return self._of_run(_RunRange(stream, run, seq_from, seq_to, stop), "crc32c", lambda rows: rows.crc_T)

    def tokens(self, stream: str, run: str, seq_from: int, seq_to: int, stop: int | None = None) -> Tensor:
        """Token ids [T] int64 of a run's rows in [seq_from, seq_to), in order; rows that are not there are left out.

        The run may be spelled in any Unicode form; of rows that are there in two, those under the given name count.
        """
        wanted = _RunRange(stream, run, seq_from, seq_to, stop, spelled=has_others(stream + run))
        found = self._of_run(wanted, "token", lambda rows: rows.token_T)
        return torch.tensor([token for _, token in sorted(found.items())], dtype=torch.int64)

    def positions(self, stream: str, run: str, seq_from: int, seq_to: int) -> dict[int, int]:
        """Positions by seq of a run's rows in [seq_from, seq_to); the run may be spelled in any Unicode form."""
        wanted = _RunRange(stream, run, seq_from, seq_to, None, spelled=has_others(stream + run))
        return self._of_run(wanted, "pos", lambda rows: rows.pos_T)

    def before(self, time: float) -> int | None:
        """The position of the first row whose time is later than `time`, in seconds; None if no row's is."""

        def look() -> int | None:
            table, left = self._look()
            found = table.select(f"time > {time!r} AND time < {TIME_END}", ["pos"], limit=1)["pos"]
            later = [int(rows.pos_T[rows.time_T > time][0]) for rows in left if bool((rows.time_T > time).any())]
            return min([*found, *later], default=None)

        return _again(look)

    def matches(self, where: str) -> Tensor:
        """Positions [T] int64 of the rows for which an SQL condition on their columns holds, ascending."""
        return torch.from_numpy(self.named(where)["pos"].to_numpy().copy())

    def named(self, where: str) -> pa.Table:
        """What the rows are called for which such a condition holds: pos, stream, run and seq, in order."""

        def look() -> pa.Table:
            table, left = self._look()
            unflushed = in_memory([rows.to_arrow() for rows in left])
            found = [] if unflushed is None else [unflushed.search().where(where).select(_NAMES).to_arrow()]
            return pa.concat_tables([table.columns(where, _NAMES), *found])

        found = _again(look)
        _, first = np.unique(found["pos"].to_numpy(), return_index=True)
        return found.take(pa.array(first))

    def tombstones(self) -> Tombstones:
        """The positions whose rows were erased."""
        return self.noted()

    def noted(self) -> Tombstones:
        """The erased positions that its own table knows of: a fork's parent may have erased more since."""
        return JournalReader(self._tables, self._fresh()).tombstones()

    @property
    def due(self) -> bool:
        """Whether there is something for `maintain` to do."""
        return self._writer.state is WriterState.READY and self._writer.loose >= _COMPACT_EVERY

    def maintain(self) -> bool:
        """Compact after every 128 commits, and drop what only old versions need; say whether it did.

        Raises:
            NotOwner: a later owner has fenced. StorageError: nothing is lost, the next append fences again.
        """
        if not self.due:
            return False
        self._writer.compact(renew=True)
        return True

    def stats(self) -> dict[str, int]:
        """Rows and bytes on disk of the table's latest version, fragments, commits so far, and what the log holds."""
        table = self._tables.open(self._writer.name)
        found = table.stats()
        return {
            "rows": found["num_rows"],
            "bytes": found["total_bytes"],
            "fragments": found["fragment_stats"]["num_fragments"],
            "commits": table.version,
            "compactions": self._writer.compactions,
            "waits": self.waits,
            "log_bytes": 0 if self._log is None else self._log.held(self.entry.id)[0],
        }

    def _look(self) -> tuple[JournalReader, list[JournalRows]]:
        """The table to read, and the log's rows, which must be read before it; some of them may be in both."""
        entry = self._fresh()
        if self._owned and self._log is not None:
            return JournalReader(self._tables, entry), self._log.rows(entry.id)
        try:
            left = [] if entry.log is None else read_log(self._tables, entry.log, entry)
        except Corrupt as error:
            if error.details.get("missing") and self._catalog.by_id(entry.id) is None:
                raise BankNotFound(f"bank {entry.name!r} was removed while it was read", bank=entry.name) from error
            raise
        return JournalReader(self._tables, entry), left

    def _fresh(self) -> Entry:
        """The catalog's line as it is now: where the rows are changes with the owner."""
        if self._owned:
            return self.entry
        found = self._catalog.by_id(self.entry.id)
        # a journal that is being made or rewritten is not in the catalog yet
        return self.entry if found is None or found.generation < self.entry.generation else found

    def _scan(self, start: int, stop: int | None, batch_rows: int) -> Iterator[JournalRows]:
        table, left = self._look()
        reached = max(start, table.entry.base)
        for rows in table.scan(start, stop, batch_rows):
            yield rows
            reached = int(rows.pos_T[-1]) + 1
        tombstones = table.tombstones() if left else NO_TOMBSTONES
        for part in left:
            rows = part.since(reached).until(stop)
            if len(rows):
                table.require_order(rows, reached, tombstones)
                yield rows.verify()
                reached = int(rows.pos_T[-1]) + 1

    def _of_run(self, wanted: _RunRange, column: str, of: Callable[[JournalRows], Tensor]) -> dict[int, int]:
        def look() -> dict[int, int]:
            table, left = self._look()
            found = {seq: value for rows in left for seq, value in wanted.of(rows, of(rows))}
            if not wanted.spelled:
                there = table.select(wanted.filter, ["seq", column])
                return found | dict(zip(there["seq"], there[column], strict=True))
            there = table.select(wanted.filter, ["stream", "run", "seq", column])
            rows = sorted(
                zip(*there.values(), strict=True), key=lambda row: (row[0], row[1]) == (wanted.stream, wanted.run)
            )
            return found | {seq: value for stream, run, seq, value in rows if wanted.names(stream, run)}

        return _again(look)

    def _add(self, parts: list[JournalRows]) -> None:
        self._writer.add(pa.concat_tables([part.to_arrow() for part in parts]))
        self._flushed_end = int(parts[-1].pos_T[-1]) + 1

    def _make_room(self) -> None:
        """Wait for a compaction that is overdue, and refuse rows rather than pile fragments up."""
        if self._writer.fragments < _SLOW_FRAGMENTS:
            return
        self.waits += 1
        failure: StorageError | None = None
        if self._writer.loose >= _COMPACT_EVERY:
            try:
                self._writer.compact(renew=True)
            except StorageError as error:
                failure = error
                self.fence()
        if self._writer.fragments >= _MAX_FRAGMENTS:
            raise Overloaded(
                f"the journal of {self.entry.name} is in {self._writer.fragments} pieces and takes no more before they "
                f"are merged{f', which fails: {failure}' if failure else ''}; try again later",
                retry_after_s=_RETRY_S,
            )


def _again(look: Callable[[], T]) -> T:
    """Look twice if what the first look had found was moved or compacted away before it could be read."""
    try:
        return look()
    except Corrupt as error:
        if not error.details.get("missing"):
            raise
        return look()


def _take(batches: Iterator[pa.RecordBatch], rows: int) -> list[pa.RecordBatch]:
    """Batches that together have at least `rows` rows: each commit's come as their own, however small."""
    taken: list[pa.RecordBatch] = []
    while sum(map(len, taken)) < rows and (batch := next(batches, None)) is not None:
        taken.append(batch)
    return taken
