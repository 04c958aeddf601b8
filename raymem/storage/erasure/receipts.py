"""Receipts of erasures, kept beside the banks and longer than they: what was erased, and how that is known."""

from __future__ import annotations

import dataclasses
import secrets
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from raymem.errors import Conflict, Corrupt
from raymem.storage.catalog import part_prefix
from raymem.storage.erasure.audit import ErasedRows
from raymem.storage.erasure.reach import FORGOTTEN, FORGOTTEN_RUNS, KEPT_NAMES, NAMED_RUNS
from raymem.storage.tables.cas_table import CasTable
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables, quote
from raymem.types import EraseReceipt, name_digest

_TABLE = "receipts"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("bank", pa.string(), nullable=False),
        pa.field("bank_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("started", pa.float64(), nullable=False),
        pa.field("receipt", pa.string(), nullable=False),
        pa.field("evidence", pa.string(), nullable=False),
    ]
)
_RECEIPT = TypeAdapter(EraseReceipt)
_KEEP_VERSIONS = timedelta(minutes=5)


class Receipts:
    """The receipts of one store; the table is made with the first."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._table = CasTable(tables, _TABLE, "the receipts", _KEEP_VERSIONS, later=True)

    def put(self, receipt: EraseReceipt, evidence: ErasedRows) -> EraseReceipt:
        """Keep a receipt in place of the one of its id; durable when it returns."""
        # what rows would be known by is of use only while a check is still to come
        self._keep(receipt, evidence.to_json() if receipt.status == "pending" else "")
        return receipt

    def _keep(self, receipt: EraseReceipt, known_by: str) -> None:
        row = {name: getattr(receipt, name) for name in ("id", "bank", "bank_id", "status", "started")}
        row |= {"receipt": _RECEIPT.dump_json(receipt).decode(), "evidence": known_by}
        rows = pa.Table.from_pylist([row], schema=_SCHEMA)

        def keep(table: Any) -> None:
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

        self._table.create(_SCHEMA.empty_table())
        self._table.change(f"keep the receipt of an erasure in {receipt.bank}", keep)

    def get(self, id: str) -> EraseReceipt | None:
        """The receipt of an id."""
        found = self._table.rows(f"id = {quote(id)}")
        return _receipt(found[0]) if found else None

    def of(self, bank: str) -> list[EraseReceipt]:
        """The receipts of banks that had this name when something was erased in them, oldest first; "" for all.

        Those of a partitioned bank are its partitions'.
        """
        where = f"bank = {quote(bank)} OR starts_with(bank, {quote(part_prefix(bank))})" if bank else "true"
        rows = self._table.rows(where)
        return [_receipt(row) for row in sorted(rows, key=lambda row: row["started"])]

    def forget_names(self, bank: str) -> list[EraseReceipt]:
        """Put salted digests for the names in those of a bank that are finished; return all, as `of` does.

        The table's files keep the names for five minutes and until the next `tidy`.
        """
        for receipt in self.of(bank):
            if receipt.status != "pending" and not receipt.names_forgotten:
                self._keep(forgotten(receipt), "")
        self.tidy()
        return self.of(bank)

    def tidy(self) -> None:
        """Drop what only older versions of the table have."""
        try:
            table = self._tables.open(_TABLE)
        except Corrupt as error:
            if not error.details.get("missing"):
                raise
            return
        # another process that writes to it tidies up, or the next sweep does
        with suppress(Conflict), writing("clear the receipts of what they no longer say"):
            if len(table.list_versions()) > 1:
                table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def pending(self) -> list[tuple[EraseReceipt, ErasedRows]]:
        """The receipts of erasures that are not finished, with what their rows would be known by."""
        rows = sorted(self._table.rows("status = 'pending'"), key=lambda row: row["started"])
        return [(receipt, self._evidence(row, receipt)) for row in rows for receipt in [_receipt(row)]]

    def _evidence(self, row: dict[str, Any], receipt: EraseReceipt) -> ErasedRows:
        return ErasedRows.from_json(row["evidence"], receipt.bank_id, receipt.what, receipt.generation)


def forgotten(receipt: EraseReceipt) -> EraseReceipt:
    """A receipt with salted digests for stream and run, and counts alone for the runs that stay."""
    what, salt = receipt.what, secrets.token_bytes(16)
    stream, run = (None if name is None else name_digest(name, salt) for name in (what.stream, what.run))
    return dataclasses.replace(
        receipt,
        what=dataclasses.replace(what, stream=stream, run=run, starts=()),
        exposed=(),
        out_of_reach=tuple(_nameless(words) for words in receipt.out_of_reach),
        names_forgotten=True,
    )


def _nameless(words: str) -> str:
    before, names_runs, _ = words.partition(NAMED_RUNS)
    if names_runs:
        return before + FORGOTTEN_RUNS
    return FORGOTTEN if words == KEPT_NAMES else words


def _receipt(row: dict[str, Any]) -> EraseReceipt:
    with reading(f"read the receipt {row['id']}"):
        return _RECEIPT.validate_json(row["receipt"])
