"""Erasing rows of a bank that this process owns: the journal is rewritten, the state made anew from what stays."""

from __future__ import annotations

from raymem.bank.replica import Replica, Runtime
from raymem.errors import RaymemError, Unsupported
from raymem.storage.erasure import erase as erasure
from raymem.storage.erasure.audit import Evidence
from raymem.storage.store import ColdStore, Entry
from raymem.types import EraseReceipt, Selection


def erase(runtime: Runtime, what: Selection, *, rebuild: bool) -> EraseReceipt:
    """Erase rows of a bank for good; writes wait meanwhile, reads are answered.

    The state is replayed from the rows that stay, so it is, bit for bit, that of a bank which never had the others.

    Args:
        runtime: of the bank, whose writes stand still.
        what: the rows.
        rebuild: whether to go on for a kind that can't take single rows out of its state.

    Raises:
        Unsupported: such a kind, without `rebuild`; nothing was changed.
        InvalidInput: a selection that can't be meant.
        NotOwner, StorageError: nothing was erased, or the receipt of what was is in the store, and the bank has to be
            loaded again.
    """
    runtime.journal.flush()
    entry = runtime.entry
    evidence = erasure.find(runtime.cold, entry, what.check())
    if not len(evidence.gone):
        return erasure.nothing(entry, evidence)
    if not (rebuild or runtime.memory.forgets):
        raise Unsupported(
            f"a {runtime.spec.kind} bank can't take {len(evidence.gone)} rows out of its state; ask for a rebuild from "
            f"the rows that stay, which replays all of them: bank.erase(…, rebuild=True) or `raymem bank erase "
            f"{entry.name} --rebuild …`"
        )
    receipt = erasure.begin(runtime.cold, entry, evidence)
    # whatever fails from here on, nothing is written to a journal that is none any more
    runtime.let_go()
    try:
        replica, evidence = _rewritten(runtime.cold, entry, evidence, str(runtime.device))
        receipt = erasure.note(runtime.cold, entry, receipt, evidence)
        switched = erasure.switch(runtime.cold, entry, replica.entry)
    except RaymemError:
        if erasure.undo(runtime.cold, receipt, evidence) is not None:
            raise
        # the error came after the switch: what can't be undone is finished
        switched = runtime.cold.catalog.get(entry.name)
    runtime.become(replica, switched)
    if runtime.log is not None:
        # it still has what settled of the rows that are gone
        runtime.log.purge(entry.id)
    return erasure.finish(runtime.cold, receipt, evidence)


def _rewritten(cold: ColdStore, entry: Entry, evidence: Evidence, device: str) -> tuple[Replica, Evidence]:
    """The bank as it will be, with a snapshot: whoever takes it over then need not replay it again."""
    rewritten, evidence = erasure.rewrite(cold, entry, evidence)
    replica = Replica(cold, rewritten, device)
    replica.catch_up()
    replica.save()
    return replica, evidence
