"""Erasing rows of a bank that this process owns: the journal is rewritten, the state made anew from what stays."""

from __future__ import annotations

from raymem.bank.primary import Primary
from raymem.bank.replica import Replica
from raymem.errors import RaymemError, Unsupported
from raymem.storage.erasure import erase as erasure
from raymem.storage.erasure.audit import ErasedRows
from raymem.storage.store import ColdStore, Entry
from raymem.types import EraseReceipt, Selection


def erase(primary: Primary, what: Selection, *, rebuild: bool) -> EraseReceipt:
    """Erase rows of a bank for good; writes wait meanwhile, reads are answered.

    The state is replayed from the rows that stay, so it is, bit for bit, that of a bank which never had the others.

    Args:
        primary: of the bank; its writes stand still.
        what: the rows.
        rebuild: whether to go on for a kind that can't take single rows out of its state.

    Raises:
        Unsupported: such a kind, without `rebuild`; nothing was changed.
        InvalidInput: a selection that can't be meant.
        NotOwner, StorageError: nothing was erased, or the receipt of what was is in the store, and the bank has to be
            loaded again.
    """
    primary.journal.flush()
    entry = primary.entry
    evidence = erasure.find(primary.cold, entry, what.check())
    if not len(evidence.gone):
        return erasure.nothing(entry, evidence)
    if not (rebuild or primary.memory.forgets):
        raise Unsupported(
            f"a {primary.spec.kind} bank can't take {len(evidence.gone)} rows out of its state; ask for a rebuild from "
            f"the rows that stay, which replays all of them: bank.erase(…, rebuild=True) or `raymem bank erase "
            f"{entry.name} --rebuild …`"
        )
    receipt = erasure.begin(primary.cold, entry, evidence)
    # whatever fails from here on, nothing is written to a journal that is none any more
    primary.let_go()
    try:
        replica, evidence = _rewritten(primary.cold, entry, evidence, str(primary.device))
        receipt = erasure.note(primary.cold, entry, receipt, evidence)
        switched = erasure.switch(primary.cold, entry, replica.entry)
    except RaymemError:
        if erasure.undo(primary.cold, receipt, evidence) is not None:
            raise
        # the error came after the switch: what can't be undone is finished
        switched = primary.cold.catalog.get(entry.name)
    primary.become(replica, switched)
    if primary.log is not None:
        # it still has what was flushed of the rows that are gone
        primary.log.purge(entry.id)
    return erasure.finish(primary.cold, receipt, evidence)


def _rewritten(cold: ColdStore, entry: Entry, evidence: ErasedRows, device: str) -> tuple[Replica, ErasedRows]:
    """The bank as it will be, with a snapshot, so that its next owner need not replay it again."""
    rewritten, evidence = erasure.rewrite(cold, entry, evidence)
    replica = Replica(cold, rewritten, device)
    replica.catch_up()
    replica.save()
    return replica, evidence
