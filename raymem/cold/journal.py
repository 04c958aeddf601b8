"""A bank's journal: the durable, ordered record of the rows that it accepted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raymem.cold.catalog import Catalog, Entry
from raymem.cold.failures import reading, writing
from raymem.cold.holes import HOLES, Holes
from raymem.cold.rows import JournalRows, bank_schema
from raymem.cold.tables import Tables, journal_table, quote
from raymem.errors import Conflict, Corrupt, NotOwner, StorageError

_COMPACT_EVERY = 128
_FRAGMENT_BYTES = 64 * 2**20
# readers that opened a version this long ago may still read it to the end without looking again
_KEEP_VERSIONS = timedelta(seconds=10)


class Journal:
    """One LanceDB table of rows in the order of `pos`, with one writer: the bank's present owner.

    Writing goes through one handle that is never refreshed, so that a later owner's fence stops it; reading opens the
    latest version each time and works for anyone. This class is the seam for a log table that a shard's banks share:
    `append` would put small groups there and `maintain` settle them here, `scan`, `find` and `end` would read both.
    """

    def __init__(self, tables: Tables, catalog: Catalog, entry: Entry) -> None:
        self._tables = tables
        self._catalog = catalog
        self._entry = entry
        self._name = journal_table(entry.id, entry.generation)
        # positions before this one are an ancestor's: see lineage.py
        self._base = entry.base
        self._schema = bank_schema(entry.spec)
        self._sync = tables.folder_sync(self._name)
        self._writer: Any = None
        self._end = 0
        self._commits = 0

    def fence(self) -> None:
        """Become the table's only writer: handles that were opened before can't append any more.

        Raises:
            NotOwner: the catalog has moved on from the epoch of the entry that this journal was opened with.
        """
        self._writer = None
        self._require_epoch()
        writer = self._open()
        self._take_over(writer)
        end = self._end_of(writer)
        self._make_durable()
        # a newer owner may have fenced before us: then we have just stopped it and must leave the bank to the next
        self._require_epoch()
        self._writer, self._end, self._commits = writer, end, 0

    def append(self, *parts: JournalRows) -> None:
        """Commit rows, all or none, and with sync="disk" make them durable before returning.

        The first append fences. After an error the handle is gone and the next append fences again.

        Raises:
            NotOwner: a later owner has fenced. StorageError: the rows were not accepted, or the journal does not end
            where they start because an earlier append was cut short: reopen the bank.
        """
        parts = tuple(part for part in parts if len(part))
        if not parts:
            return
        if self._writer is None:
            self.fence()
        self._require_end(int(parts[0].pos_T[0]))
        writer, self._writer = self._writer, None
        before = writer.version
        try:
            with writing(f"append to {self._entry.name}"):
                writer.add(pa.concat_tables([part.to_arrow() for part in parts]))
        except Conflict as error:
            raise self._fenced() from error
        if writer.version != before + 1:
            raise self._fenced()
        self._make_durable()
        self._writer = writer
        self._end += sum(map(len, parts))
        self._commits += 1

    def end(self) -> int:
        """The position that the next row will get."""
        return self._end_of(self._open())

    def rows(self) -> int:
        """How many rows there are; positions are more once rows were erased."""
        return self.end() - len(self.holes())

    def scan(self, start: int = 0, stop: int | None = None, batch_rows: int = 4096) -> Iterator[JournalRows]:
        """Rows from position `start` up to `stop` in order, checked; rows appended meanwhile may be left out.

        Raises:
            Corrupt: naming the position at which a checksum, the order or the file itself did not hold.
        """
        failed_at = -1
        while True:
            try:
                for rows in self._scan_version(start, stop, batch_rows):
                    yield rows
                    start = int(rows.pos_T[-1]) + 1
                return
            except Corrupt as error:
                # the owner may have compacted the version that we were reading: the latest one has the same rows
                if not error.details.get("missing") or failed_at == start:
                    raise
                failed_at = start

    def find(self, stream: str, run: str, seq_from: int, seq_to: int, stop: int | None = None) -> dict[int, int]:
        """Checksums by seq of a run's rows in [seq_from, seq_to) that are there already, before position `stop`."""
        where = _run_filter(stream, run, seq_from, seq_to, stop)
        with reading(f"search the journal of {self._entry.name}"):
            found = self._open().search().where(where).select(["seq", "crc32c"]).to_arrow()
        return dict(zip(found["seq"].to_pylist(), found["crc32c"].to_pylist(), strict=True))

    def matches(self, where: str) -> Tensor:
        """Positions [T] int64 of the rows for which an SQL condition on their columns holds, ascending."""
        with reading(f"search the journal of {self._entry.name}"):
            found = self._open().search().where(where).select(["pos"]).to_arrow()
        return torch.tensor(found["pos"].to_pylist(), dtype=torch.int64).sort().values

    def holes(self) -> Holes:
        """The positions whose rows were erased."""
        return self.noted()

    def noted(self) -> Holes:
        """The erased positions that its own table knows of: a fork's parent may have erased more since."""
        return self._holes_of(self._open())

    def tokens(self, stream: str, run: str, seq_from: int, seq_to: int, stop: int | None = None) -> Tensor:
        """Token ids [T] int64 of a run's rows in [seq_from, seq_to), in order; rows that are not there are left out."""
        where = _run_filter(stream, run, seq_from, seq_to, stop)
        with reading(f"search the journal of {self._entry.name}"):
            found = self._open().search().where(where).select(["seq", "token"]).to_arrow()
        return torch.tensor(found.sort_by("seq")["token"].to_pylist(), dtype=torch.int64)

    def before(self, time: float) -> int | None:
        """The position of the first row whose time is later than `time`, in seconds; None if no row's is."""
        with reading(f"search the journal of {self._entry.name}"):
            found = self._open().search().where(f"time > {time!r}").select(["pos"]).limit(1).to_arrow()["pos"]
        return int(found[0].as_py()) if len(found) else None

    def maintain(self) -> bool:
        """Compact after every 128 commits, and drop what only old versions need; say whether it did.

        Raises:
            NotOwner: a later owner has fenced. StorageError: nothing is lost, the next append fences again.
        """
        if self._writer is None or self._commits < _COMPACT_EVERY:
            return False
        writer, self._writer = self._writer, None
        try:
            self._compact(writer)
        except Conflict as error:
            raise self._fenced() from error
        self._writer, self._commits = writer, 0
        return True

    def stats(self) -> dict[str, int]:
        """Rows, bytes on disk of the latest version, fragments, and commits so far."""
        table = self._open()
        with reading(f"measure the journal of {self._entry.name}"):
            found = table.stats()
        fragments = found["fragment_stats"]["num_fragments"]
        return {
            "rows": found["num_rows"],
            "bytes": found["total_bytes"],
            "fragments": fragments,
            "commits": table.version,
        }

    def _open(self) -> Any:
        return self._tables.open(self._name)

    def _scan_version(self, start: int, stop: int | None, batch_rows: int) -> Iterator[JournalRows]:
        name = self._entry.name
        table = self._open()
        holes = self._holes_of(table)
        start = max(start, self._base)
        limits = [f"pos >= {start}"] * (start > self._base) + [f"pos < {stop}"] * (stop is not None)
        with reading(f"read the journal of {name} from position {start}"):
            query = table.search()
            if limits:
                query = query.where(" AND ".join(limits))
            batches = iter(query.to_batches(batch_rows))
        expect = start
        while True:
            with reading(f"read the journal of {name} at position {expect}"):
                pieces = self._pieces(_take(batches, batch_rows))
            if not pieces:
                return
            for rows in pieces:
                self._require_order(rows, expect, holes)
                expect = int(rows.pos_T[-1]) + 1
                yield rows.verify()

    def _pieces(self, batches: list[pa.RecordBatch]) -> list[JournalRows]:
        if batches and not batches[0].schema.equals(self._schema):
            raise Corrupt(
                f"the journal of {self._entry.name} has another schema than its spec says: {batches[0].schema}; "
                "restore the bank from an export or a copy of the store"
            )
        return JournalRows.from_arrow(pa.Table.from_batches(batches, schema=self._schema))

    def _require_order(self, rows: JournalRows, expect: int, holes: Holes) -> None:
        at = holes.wrong(rows.pos_T, expect)
        if at is not None:
            wanted = holes.next(int(rows.pos_T[at - 1]) + 1 if at else expect)
            raise Corrupt(
                f"the journal of {self._entry.name} has position {int(rows.pos_T[at])} where {wanted} belongs; "
                "restore the bank from an export or a copy of the store",
                pos=wanted,
            )

    def _end_of(self, table: Any) -> int:
        holes = self._holes_of(table)
        with reading(f"find the end of the journal of {self._entry.name}"):
            rows = int(table.count_rows())
            last = table.search().select(["pos"]).offset(rows - 1).limit(1).to_arrow()["pos"] if rows else []
        # of a journal whose last rows were erased, the next row still gets a position of its own
        end: int = max(holes.end, last[0].as_py() + 1 if rows else self._base)
        if rows != int(np.diff(holes.rank(np.array([self._base, end])))[0]):
            raise Corrupt(
                f"the journal of {self._entry.name} holds {rows} rows but ends at position {end}, of which "
                f"{len(holes)} were erased; restore the bank from an export or a copy of the store",
                pos=end,
            )
        return end

    def _holes_of(self, table: Any) -> Holes:
        with reading(f"open the journal of {self._entry.name}"):
            text = (table.schema.metadata or {}).get(HOLES)
        return Holes() if text is None else Holes.decode(text)

    def _take_over(self, writer: Any) -> None:
        """Commit a restore: appends based on an older version conflict with it."""
        latest = writer.version
        self._restore(writer, latest - 1 if self._cut_short(latest) else latest)
        while writer.version != latest + 1:
            # something was committed between our look and our restore, which has just undone it: bring it back
            latest = writer.version
            self._restore(writer, latest - 1)

    def _cut_short(self, version: int) -> bool:
        """Whether the latest commit is a fence that undid an append and died before bringing it back."""
        if version == 1:
            return False
        table = self._open()
        with reading(f"open version {version} of the journal of {self._entry.name}"):
            table.checkout(version)
            rows = table.count_rows()
        try:
            with reading(f"open version {version - 1} of the journal of {self._entry.name}"):
                table.checkout(version - 1)
                return bool(table.count_rows() > rows)
        except Corrupt:
            # cleaned up, which only a finished fence allows
            return False

    def _restore(self, writer: Any, version: int) -> None:
        with writing(f"fence the journal of {self._entry.name}"):
            writer.restore(version)

    def _compact(self, writer: Any) -> None:
        with writing(f"compact the journal of {self._entry.name}"):
            dataset = writer.to_lance()
            dataset.optimize.compact_files(target_rows_per_fragment=self._fragment_rows())
        # the new files must be on disk before the old ones go
        self._make_durable()
        # dropping the version that holds our fence would let an older owner append again (measured): renew it first
        self._restore(writer, dataset.version)
        if writer.version != dataset.version + 1:
            self._restore(writer, writer.version - 1)
            raise self._fenced()
        with writing(f"clean up the journal of {self._entry.name}"):
            writer.to_lance().cleanup_old_versions(older_than=_KEEP_VERSIONS)
        self._make_durable()

    def _fragment_rows(self) -> int:
        hidden = self._schema.field("hidden").type
        row_bytes: int = hidden.list_size * hidden.value_type.bit_width // 8
        return max(1, _FRAGMENT_BYTES // row_bytes)

    def _make_durable(self) -> None:
        if self._sync:
            with writing(f"sync the journal of {self._entry.name}"):
                self._sync.sync()

    def _require_epoch(self) -> None:
        self._catalog.require(self._entry.name, self._entry.id, self._entry.epoch)

    def _require_end(self, pos: int) -> None:
        if pos != self._end:
            raise StorageError(
                f"the journal of {self._entry.name} ends at position {self._end}, not {pos}: an earlier append was cut "
                "short; reopen the bank and write again, rows that are there already are recognised"
            )

    def _fenced(self) -> NotOwner:
        return NotOwner(
            f"a later owner has taken over bank {self._entry.name}; nothing was acknowledged, look up who owns it"
        )


def _run_filter(stream: str, run: str, seq_from: int, seq_to: int, stop: int | None) -> str:
    where = f"stream = {quote(stream)} AND run = {quote(run)} AND seq >= {seq_from} AND seq < {seq_to}"
    return where if stop is None else f"{where} AND pos < {stop}"


def _take(batches: Iterator[pa.RecordBatch], rows: int) -> list[pa.RecordBatch]:
    """Batches that together have at least `rows` rows: each commit's come as their own, however small."""
    taken: list[pa.RecordBatch] = []
    while sum(map(len, taken)) < rows and (batch := next(batches, None)) is not None:
        taken.append(batch)
    return taken
