"""Incarnations: the processes that own banks, each with a counter that moves for as long as its lease runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa

from raymem.storage.tables.cas_table import CasTable
from raymem.storage.tables.tables import Tables, log_table, quote

_TABLE = "incarnations"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("owner", pa.string(), nullable=False),
        pa.field("beats", pa.int64(), nullable=False),
        pa.field("lease_s", pa.float64(), nullable=False),
        pa.field("started", pa.float64(), nullable=False),
    ]
)
# each beat is a version: no reader keeps an old one for long
_KEEP_VERSIONS = timedelta(seconds=60)


@dataclass(frozen=True)
class Incarnation:
    """One life of an owner: `beats` stands still once it has ended, and after `lease_s` of that it is over for good."""

    id: str
    owner: str
    beats: int
    lease_s: float
    started: float


class LeaseTable:
    """The incarnations whose leases may run; an owner that has none here holds nothing."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._table = CasTable(tables, _TABLE, "the incarnations", keep=_KEEP_VERSIONS, later=True)
        self._made = False

    def register(self, id: str, owner: str, lease_s: float) -> None:
        """Begin an incarnation of `owner`; earlier ones of the same name end here.

        Args:
            id: of its own, never used before.
            owner: the name under which it claims banks.
            lease_s: seconds for which its counter may stand still.
        """
        self._make()
        row = Incarnation(id, owner, 0, lease_s, time.time())
        rows = pa.Table.from_pylist([vars(row)], schema=_SCHEMA)
        self._table.change(f"register {owner}", lambda table: table.add(rows))
        self._delete(f"owner = {quote(owner)} AND id != {quote(id)}")

    def beat(self, id: str) -> bool:
        """Move an incarnation's counter; False if it has been ended."""
        where = f"id = {quote(id)}"
        moved = self._table.change(
            f"renew lease {id}", lambda table: table.update(where, values_sql={"beats": "beats + 1"})
        )
        return int(moved.rows_updated) == 1

    def retire(self, id: str) -> None:
        """End an incarnation."""
        self._delete(f"id = {quote(id)}")

    def expire(self, seen: Incarnation) -> bool:
        """End an incarnation unless its counter has moved since it was seen; say whether it has ended."""
        self._delete(f"id = {quote(seen.id)} AND beats = {seen.beats}")
        return all(there.id != seen.id for there in self.list())

    def list(self, owner: str | None = None) -> list[Incarnation]:
        """All incarnations, or those of one owner, oldest first."""
        rows = self._table.rows("true" if owner is None else f"owner = {quote(owner)}")
        return sorted((Incarnation(**row) for row in rows), key=lambda row: row.started)

    def held(self, owner: str) -> bool | None:
        """Whether a process of this machine holds a log of one of an owner's incarnations; None if that can't be told.

        A copy of the store has the rows of those who own banks in the original, and none of them holds a log here.
        """
        holds = [self._tables.is_locked(log_table(each.id)) for each in self.list(owner)]
        return None if None in holds else any(holds)

    def _make(self) -> None:
        if not self._made:
            self._table.create(_SCHEMA.empty_table())
            self._made = True

    def _delete(self, where: str) -> None:
        if self._table.rows(where):
            self._table.change("end an incarnation", lambda table: table.delete(where))
