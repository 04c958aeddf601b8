"""Deleting what the catalog doesn't name: left by a process that died, or brought back by one that wrote too late."""

from __future__ import annotations

import dataclasses
import re
import time

from raymem.errors import Corrupt
from raymem.storage.catalog import Entry
from raymem.storage.erasure import erase as erasure
from raymem.storage.erasure.audit import ErasedRows
from raymem.storage.store import ColdStore
from raymem.storage.tables.files import Files
from raymem.types import EraseReceipt, SweepReport

_TABLE = re.compile(r"(?P<kind>journal|snapshots|attended|log)-(?P<id>[0-9a-f]{32})(?:-\d+)?")


def sweep(cold: ColdStore, age_s: float, *, dry_run: bool = False) -> SweepReport:
    """Delete tables that the catalog doesn't name, of banks and logs, and parts of snapshots that were cut short.

    Then go on with erasures that are not finished. A table that is being made now is not named yet, and a snapshot is
    saved part by part: a table is left alone until nothing was written to it for `age_s` seconds. The catalog is asked
    again just before each deletion.

    Args:
        cold: the store.
        age_s: the safety age.
        dry_run: only say what would be deleted.
    """
    files = Files(cold.tables)
    deleted, young, size, unfinished = [], [], 0, 0
    for name in files.tables():
        match = _TABLE.fullmatch(name)
        if match is None:
            continue
        there, named = files.of(name), _is_named(cold, name, match)
        is_young = time.time() - max((file.written for file in there), default=0.0) < age_s
        if named:
            unfinished += 0 if is_young else _cut_short(cold, match, dry_run)
            continue
        if is_young:
            young.append(name)
            continue
        if not dry_run:
            if _is_named(cold, name, match):
                continue
            cold.tables.drop(name)
        deleted.append(name)
        size += sum(file.bytes for file in there)
    if not dry_run:
        cold.receipts.tidy()
    receipts = () if dry_run else tuple(_go_on(cold, *found, age_s) for found in cold.receipts.pending())
    return SweepReport(tuple(deleted), tuple(young), size, unfinished, receipts)


def _cut_short(cold: ColdStore, match: re.Match[str], dry_run: bool) -> int:
    """How many snapshots of a bank were cut short; their parts go."""
    if match["kind"] != "snapshots":
        return 0
    try:
        entry = cold.catalog.by_id(match["id"])
    except Corrupt:
        # its line can't be read: its tables stay until it is removed
        return 0
    if entry is None:
        return 0
    snapshots = cold.snapshots(entry)
    return len(snapshots.unfinished()) if dry_run else snapshots.clear()


def _is_named(cold: ColdStore, table: str, match: re.Match[str]) -> bool:
    if match["kind"] == "log":
        # an incarnation makes its log before it claims a bank
        living = {incarnation.id for incarnation in cold.lease_table.list()}
        return match["id"] in living or bool(cold.catalog.logged(match["id"]))
    return any(table in line.tables for line in cold.catalog.lines(id=match["id"]))


def _go_on(cold: ColdStore, receipt: EraseReceipt, evidence: ErasedRows, age_s: float) -> EraseReceipt:
    entry = cold.catalog.by_id(receipt.bank_id)
    if entry is None or _has_erased(cold, entry, evidence):
        return erasure.finish(cold, receipt, evidence)
    # the erasure may still be under way
    if time.time() - receipt.started < age_s:
        return receipt
    return cold.receipts.put(
        dataclasses.replace(receipt, status="undone", finished=time.time(), reason="nothing was erased"), evidence
    )


def _has_erased(cold: ColdStore, entry: Entry, evidence: ErasedRows) -> bool:
    """Whether the bank's present journal says that these rows were erased."""
    return not evidence.gone - cold.journal(entry).tombstones()
