"""What a bank's own table says: the rows of its journal that were flushed there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from raymem.errors import Corrupt
from raymem.rows import JournalRows
from raymem.storage.catalog import Entry
from raymem.storage.journal.tombstones import TOMBSTONES, Tombstones, bank_schema
from raymem.storage.spellings import alike, same
from raymem.storage.tables.disk import reading
from raymem.storage.tables.tables import Tables, journal_table


class JournalReader:
    """One bank's table for reading; every look opens the latest version and works for anyone."""

    def __init__(self, tables: Tables, entry: Entry) -> None:
        self._tables = tables
        self.entry = entry
        self._name = journal_table(entry.id, entry.generation)

    def extent(self) -> tuple[int, Tombstones]:
        """The position after the last one that was flushed or erased, and those that were erased, of one version.

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
        if rows != int(np.diff(tombstones.rank(np.array([self.entry.base, end])))[0]):
            raise Corrupt(
                f"the journal of {self.entry.name} holds {rows} rows but ends at position {end}, of which "
                f"{len(tombstones)} were erased; restore the bank from an export or a copy of the store",
                pos=end,
            )
        return end, tombstones

    def tombstones(self, table: Any = None) -> Tombstones:
        """The positions whose rows were erased."""
        with reading(f"open the journal of {self.entry.name}"):
            table = self._tables.open(self._name) if table is None else table
            text = (table.schema.metadata or {}).get(TOMBSTONES)
        return Tombstones() if text is None else Tombstones.decode(text)

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


def _take(batches: Iterator[pa.RecordBatch], rows: int) -> list[pa.RecordBatch]:
    """Batches that together have at least `rows` rows: each commit's come as their own, however small."""
    taken: list[pa.RecordBatch] = []
    while sum(map(len, taken)) < rows and (batch := next(batches, None)) is not None:
        taken.append(batch)
    return taken
