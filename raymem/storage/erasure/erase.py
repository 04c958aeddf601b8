"""Erasing rows of a bank: its journal is written anew without them, the catalog switched, the old folder deleted.

Never in place: cleaning a table up beside an appender can make it unreadable (measured), and its old versions, its
snapshots, its log and the keys and values beside it hold the rows too. A process that is killed at any step leaves all
of the rows or none.
"""

from __future__ import annotations

import dataclasses
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from raymem.storage.catalog import bank_of
from raymem.storage.erasure.audit import ErasedRows, contents, inspect, sample
from raymem.storage.erasure.reach import LISTED, beyond, inherited, is_reached, reach
from raymem.storage.journal.tombstones import Tombstones, bank_schema
from raymem.storage.store import ColdStore, Entry
from raymem.storage.tables.files import Files
from raymem.storage.tables.tables import attended_table, journal_table, snapshot_table
from raymem.types import EraseReceipt, FileCheck, Selection

_OF_A_BANK = re.compile(r"(journal|snapshots|attended)-(?P<bank>[0-9a-f]+)(-(?P<generation>\d+))?")


def find(cold: ColdStore, entry: Entry, what: Selection) -> ErasedRows:
    """Which rows of a flushed bank a selection is about, and how they would be known once they are gone.

    Of a fork these are also the rows that were erased in its parent since: its own states have them still.
    """
    journal = cold.journal(entry)
    found = reach(journal, what, vectors=bool(entry.spec.fingerprint.values))
    gone = Tombstones.of(found.gone_T.tolist(), journal.end()) | (journal.tombstones() - journal.noted())
    wanted, digests = sample(gone), set[bytes]()
    if wanted:
        for rows in journal.scan(gone.first, max(wanted) + 1):
            picked = [row for row, pos in enumerate(rows.pos_T.tolist()) if pos in wanted]
            for batch in rows.to_arrow().combine_chunks().to_batches():
                digests.update(contents(batch, picked))
    if what.scope == "run":
        what = dataclasses.replace(what, starts=tuple({*what.starts, *found.starts}))
    return ErasedRows(entry.id, what, entry.next_generation, gone, frozenset(digests), found)


def is_due(cold: ColdStore, entry: Entry, what: Selection) -> bool:
    """Whether a bank has rows that a selection is about, or, being a fork, states with rows that its parent erased."""
    journal = cold.journal(entry)
    return is_reached(journal, what) or len(journal.tombstones()) > len(journal.noted())


def begin(cold: ColdStore, entry: Entry, evidence: ErasedRows) -> EraseReceipt:
    """Run the check, which must find the rows now, and put down what is about to happen."""
    check, found = inspect(Files(cold.tables), evidence), evidence.reach
    own = len(evidence.gone) - len(evidence.gone.until(entry.base)) + cold.attended(entry).count(evidence.gone)
    forks = {fork.name: "" for fork in cold.catalog.forks(entry.id)}
    receipt = EraseReceipt(
        id=uuid.uuid4().hex,
        bank=entry.name,
        bank_id=entry.id,
        # a sweep may have to go on with the forks
        what=evidence.what if forks else dataclasses.replace(evidence.what, starts=()),
        rows=len(evidence.gone),
        generation=evidence.generation,
        status="pending",
        started=time.time(),
        before=check,
        proves=check.found >= max(1, own),
        reason="the rows are being erased",
        forks=forks,
        followed_rows=found.followed,
        exposed_rows=sum(run.rows for run in found.exposed),
        exposed=found.exposed[:LISTED],
        later_rows=found.later,
    )
    words = _beyond(cold, entry, receipt, evidence)
    return cold.receipts.put(dataclasses.replace(receipt, out_of_reach=words), evidence)


def note(cold: ColdStore, entry: Entry, receipt: EraseReceipt, evidence: ErasedRows) -> EraseReceipt:
    """Put down what the rewriting showed, before its switch: which contents rows that stay have too."""
    receipt = dataclasses.replace(receipt, same_rows=evidence.same)
    words = _beyond(cold, entry, receipt, evidence)
    return cold.receipts.put(dataclasses.replace(receipt, out_of_reach=words), evidence)


def nothing(entry: Entry, evidence: ErasedRows) -> EraseReceipt:
    """The receipt of an erasure that no row is about; it proves nothing and isn't kept."""
    now, none = time.time(), FileCheck(0, 0, 0, 0)
    about = (uuid.uuid4().hex, entry.name, entry.id, evidence.what, 0, entry.generation)
    return EraseReceipt(*about, "complete", now, none, none, finished=now, reason="no row of the bank is meant")


def rewrite(cold: ColdStore, entry: Entry, evidence: ErasedRows) -> tuple[Entry, ErasedRows]:
    """Write the rows that stay to a table of the new generation; no reader sees it until the catalog names it.

    A fork goes on reading its parent's rows, unless some of those are to go from the fork alone: then it takes along
    what stays of them and is a fork no more.

    Returns:
        The entry as it will be, and the evidence without contents that rows which stay have too.

    Raises:
        NotOwner: the bank has another owner or another journal by now.
    """
    journal = cold.journal(entry)
    there = journal.tombstones()
    rewritten = dataclasses.replace(entry, generation=evidence.generation)
    if evidence.gone.until(entry.base) - there:
        rewritten = dataclasses.replace(rewritten, parent=None, base=0)
    tombstones = there | evidence.gone
    shared: Counter[bytes] = Counter()

    def survivors() -> Iterator[pa.RecordBatch]:
        for rows in journal.scan(rewritten.base):
            for batch in rows.to_arrow().combine_chunks().to_batches():
                stay = batch.filter(pa.array(~evidence.gone.has(batch["pos"].to_numpy())))
                kept = contents(stay, list(range(len(stay)))) if evidence.contents else []
                shared.update(digest for digest in kept if digest in evidence.contents)
                yield stay.replace_schema_metadata(schema.metadata)

    schema = bank_schema(entry.spec, tombstones)
    # an earlier try of this owner may have left half of it
    cold.catalog.unchanged(entry)
    cold.tables.drop(journal_table(entry.id, evidence.generation))
    cold.tables.fill(journal_table(entry.id, evidence.generation), schema, survivors())
    cold.attended(entry).rewrite(rewritten, tombstones)
    rest = evidence.contents - shared.keys()
    return rewritten, dataclasses.replace(evidence, contents=rest, same=shared.total())


def switch(cold: ColdStore, entry: Entry, rewritten: Entry) -> Entry:
    """Make the new generation the bank's journal: from here on the rows are erased.

    Raises:
        NotOwner: the bank has another owner or another journal by now; nothing was erased.
    """
    values = {name: getattr(rewritten, name) for name in ("generation", "parent", "base")}
    return cold.catalog.change(entry, **values)


def undo(cold: ColdStore, receipt: EraseReceipt, evidence: ErasedRows) -> EraseReceipt | None:
    """After a failure: clear the new generation away, unless the catalog names it after all; then None."""
    present = cold.catalog.by_id(receipt.bank_id)
    if present is not None and present.generation == evidence.generation:
        return None
    for table in (journal_table, snapshot_table, attended_table):
        cold.tables.drop(table(receipt.bank_id, evidence.generation))
    done = dataclasses.replace(receipt, status="undone", finished=time.time(), reason="nothing was erased")
    return cold.receipts.put(done, evidence)


def finish(cold: ColdStore, receipt: EraseReceipt, evidence: ErasedRows) -> EraseReceipt:
    """Delete what earlier generations left, look at every file again, and say on the receipt what was found."""
    files = Files(cold.tables)
    present = cold.catalog.by_id(receipt.bank_id)
    for name in files.tables():
        if receipt.bank_id in name and (present is None or is_older(name, present)):
            cold.tables.drop(name)
    after = inspect(files, evidence)
    reason = _left(cold, receipt, after)
    done = dataclasses.replace(
        receipt,
        what=receipt.what if reason else dataclasses.replace(receipt.what, starts=()),
        status="pending" if reason else "complete",
        after=after,
        finished=None if reason else time.time(),
        reason=reason,
    )
    return cold.receipts.put(done, evidence)


def record_forks(cold: ColdStore, receipt: EraseReceipt, forks: dict[str, str]) -> EraseReceipt:
    """Put down the receipts of the same erasure in the bank's forks, and look again whether all is done."""
    receipt = dataclasses.replace(receipt, forks=forks)
    for pending, evidence in cold.receipts.pending():
        if pending.id == receipt.id:
            return finish(cold, receipt, evidence)
    return receipt


def is_older(table: str, entry: Entry) -> bool:
    """Whether a table of a bank is one of an earlier generation, which no one will ever name again."""
    found = _OF_A_BANK.fullmatch(table)
    return found is not None and found["bank"] == entry.id and int(found["generation"] or 0) < entry.generation


def _beyond(cold: ColdStore, entry: Entry, receipt: EraseReceipt, evidence: ErasedRows) -> tuple[str, ...]:
    """What is out of reach, and the parent of a fork whose inherited rows it still has."""
    parent = cold.catalog.by_id(entry.parent) if entry.parent else None
    if parent is None or not evidence.gone.until(entry.base) - cold.journal(entry).tombstones():
        return beyond(receipt)
    return beyond(receipt, bank_of(parent.name))


def _left(cold: ColdStore, receipt: EraseReceipt, after: FileCheck) -> str:
    forks, what = cold.catalog.forks(receipt.bank_id), receipt.what
    left = {fork.name for fork in forks if is_due(cold, fork, inherited(what, fork.base))}
    open_forks = [name for name, id in receipt.forks.items() if name in left and not _is_complete(cold, id)]
    parts = [f"{after.found} finds in files that are left"] if after.found else []
    parts += [f"{after.unreadable} files can't be decoded"] if after.unreadable else []
    parts += [f"forks still have the rows: {', '.join(open_forks)}"] if open_forks else []
    return "; ".join(parts)


def _is_complete(cold: ColdStore, receipt_id: str) -> bool:
    receipt = cold.receipts.get(receipt_id) if receipt_id else None
    return receipt is not None and receipt.status == "complete"
