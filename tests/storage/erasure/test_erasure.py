"""Erasing: what is gone, what stays, and a receipt that could have failed."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import raymem
from raymem import Bank, Settings, Store
from raymem.bank import merge as merging
from raymem.config import ColdSettings
from raymem.encode.keys import ContextRows
from raymem.errors import BankNotFound, Conflict, InvalidInput, Unsupported
from raymem.memory import kinds
from raymem.storage.catalog import Entry
from raymem.storage.erasure import erase as erasure
from raymem.storage.erasure.audit import inspect
from raymem.storage.export.export import export_bank
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.log import Log
from raymem.storage.store import ColdStore
from raymem.storage.tables.files import Files

FORGETFUL = ["larimar", "spalm"]


def fill(bank: Bank, tiny, *streams: str) -> None:
    """Two runs a stream, in three interleaved pieces each."""
    for seq in (0, 11, 22):
        for stream in streams:
            for run in ("r1", "r2"):
                bank.write(tiny.talk(stream, 11, run=run, seq=seq))


def bank_of(store: Store, tiny, name: str, kind: str, *streams: str) -> Bank:
    bank = store.create(f"lab/{name}", tiny.spec(kind))
    fill(bank, tiny, *streams)
    return bank


def names(bank: Bank, tiny, stream: str) -> set[str]:
    """The streams that a bank says it remembers when it is asked with one's own states."""
    readout = bank.read(tiny.talk(stream, 33, run="r1").hidden, 8)
    return {row.stream for query in range(33) for row in readout.rows(query)}


@pytest.mark.parametrize("kind", kinds())
def test_a_bank_is_as_if_the_stream_had_never_been(store, tiny, kind):
    bank = bank_of(store, tiny, "a", kind, "alice", "bob", "carol")
    never = bank_of(store, tiny, "b", kind, "bob", "carol")

    receipt = bank.erase(stream="alice", rebuild=kind not in FORGETFUL)

    assert (receipt.status, receipt.rows, receipt.proves) == ("complete", 66, True)
    queries = tiny.talk("alice", 33, run="r1").hidden
    got, expected = bank.read(queries, 8), never.read(queries, 8)
    # the same rows in the same order: nothing may differ but positions
    for field in ("values_QV", "relevance_Q", "tokens_Qk", "scores_Qk", "seq_Qk", "source_Qk"):
        assert _same(getattr(got, field), getattr(expected, field)), field
    assert got.sources == expected.sources


def _same(got: Any, expected: Any) -> bool:
    return got is expected if expected is None else torch.equal(got, expected)


@pytest.mark.parametrize("kind", sorted(set(kinds()) - set(FORGETFUL)))
def test_a_kind_that_can_not_take_rows_out_refuses_unless_asked(store, tiny, kind):
    bank = bank_of(store, tiny, "a", kind, "alice", "bob")
    before = bank.digest()

    with pytest.raises(Unsupported, match=r"66 rows.*rebuild"):
        bank.erase(stream="alice")

    assert bank.digest() == before
    assert bank.receipts() == []


def test_what_stays_survives_a_restart_and_goes_on(store, tiny, tmp_path):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.erase(stream="bob")
    erased = bank.digest()
    bank.detach()
    bank.attach()

    assert bank.digest() == erased
    assert bank.info().rows == 66
    # the last rows were erased: their positions are not given again
    assert bank.write(tiny.talk("dora", 5, run="r")).end == 132 + 5
    assert names(bank, tiny, "bob") <= {"alice", "dora"}
    assert bank.write(tiny.talk("alice", 33, run="r1")).duplicates == 33


def test_a_replay_from_the_journal_alone_gives_the_same_bank(store, tiny, cold):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.erase(stream="alice")
    erased = bank.digest()
    entry = cold.catalog.get("lab/a")
    bank.detach()
    cold.tables.drop(f"snapshots-{entry.id}-{entry.generation}")

    bank.attach()

    assert bank.digest() == erased


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ({"stream": "alice", "run": "r1"}, 33),
        ({"stream": "alice", "run": "r1", "seq_from": 5, "seq_to": 9}, 4),
        ({"stream": "alice", "run": "r2", "seq_from": 30}, 3),
        ({"before": 2.0}, 132),
        ({"stream": "bob", "before": 2.0}, 66),
    ],
)
def test_exactly_what_is_named_goes(store, tiny, what, rows):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.write(tiny.talk("late", 7, time=3.0, run="r"))

    receipt = bank.erase(**what)

    assert (receipt.rows, receipt.status) == (rows, "complete")
    assert bank.info().rows == 139 - rows
    assert bank.erase(**what).rows == 0


def test_rows_of_a_run_that_was_cut_are_as_if_there_had_been_a_gap(store, tiny):
    bank = bank_of(store, tiny, "a", "spalm", "alice")
    bank.erase(stream="alice", run="r1", seq_from=5, seq_to=9)
    never = store.create("lab/b", tiny.spec("spalm"))
    for start, stop in ((0, 5), (9, 33)):
        never.write(tiny.talk("alice", stop - start, run="r1", seq=start))

    readout = bank.read(tiny.talk("alice", 33, run="r1").hidden, 4)
    expected = never.read(tiny.talk("alice", 33, run="r1").hidden, 4)

    # row 4 was paired with the token of row 5, which is gone: no neighbour may know it
    assert torch.equal(readout.scores_Qk[:, 0] > 0.99, expected.scores_Qk[:, 0] > 0.99)
    assert not bool((readout.scores_Qk[4] > 0.99).any())


@pytest.mark.parametrize(
    "what", [{}, {"run": "r"}, {"stream": "s", "seq_from": 1}, {"stream": ""}, {"before": float("nan")}]
)
def test_a_selection_that_can_not_be_meant_is_refused(store, tiny, what):
    bank = bank_of(store, tiny, "a", "spalm", "alice")

    with pytest.raises(InvalidInput):
        bank.erase(**what)

    assert bank.info().rows == 66


def test_a_cold_bank_is_erased_and_stays_cold(store, tiny):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.detach()

    assert bank.erase(stream="alice").status == "complete"
    assert (bank.info().state, bank.info().rows) == ("cold", 66)


def test_a_stream_may_come_back_after_it_was_erased(store, tiny, cold):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.erase(stream="alice")

    ack = bank.write(tiny.talk("alice", 7, run="r1"))
    bank.detach()

    assert (ack.rows, ack.duplicates, ack.gaps) == (7, 0, 0)
    assert bank.erase(stream="alice").rows == 7
    assert [receipt.rows for receipt in bank.receipts()] == [66, 7]


def test_two_streams_that_began_alike_do_not_betray_each_other(store, tiny):
    # a shared prompt gives the same states under both names: those that stay are no finds
    bank = store.create("lab/a", tiny.spec())
    for stream in ("alice", "bob"):
        bank.write(tiny.trace(20, stream=stream))

    receipt = bank.erase(stream="alice")

    assert (receipt.status, receipt.after.found) == ("complete", 0)


def folders(cold: ColdStore) -> set[str]:
    return {name for name in Files(cold.tables).tables() if name.startswith(("journal-", "snapshots-"))}


def test_only_the_new_folders_are_left(store, tiny, cold):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.detach()
    bank.attach()
    before = folders(cold)
    receipt = bank.erase(stream="alice")

    assert len(before) == 2
    assert not folders(cold) & before
    assert all(name.endswith(f"-{receipt.generation}") for name in folders(cold))


def _leave(cold: ColdStore, bank_id: str, leftover: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep one kind of old file from being deleted, as a failing disk or a late writer would."""
    drop = cold.tables.__class__.drop

    def reluctant(self, name: str) -> None:
        if not name.startswith(f"{leftover}-{bank_id}"):
            drop(self, name)

    monkeypatch.setattr(cold.tables.__class__, "drop", reluctant)


@pytest.mark.parametrize("leftover", ["journal", "snapshots"])
@pytest.mark.parametrize("kind", ["spalm", "titans"])
def test_the_check_fails_while_an_old_folder_is_left(store, tiny, cold, leftover, kind, monkeypatch):
    bank = bank_of(store, tiny, "a", kind, "alice", "bob")
    bank.detach()
    bank.attach()
    with monkeypatch.context() as patched:
        _leave(cold, cold.catalog.get("lab/a").id, leftover, patched)
        receipt = bank.erase(stream="alice", rebuild=True)

    assert receipt.status == "pending"
    assert receipt.after.found > 0

    swept = store.sweep()

    assert [found.status for found in swept.receipts] == ["complete"]
    assert [found.status for found in bank.receipts()] == ["complete"]


def test_the_check_decodes_files_that_no_version_names(store, tiny, cold):
    bank_of(store, tiny, "a", "spalm", "alice", "bob")
    entry = cold.catalog.get("lab/a")
    evidence = erasure.find(cold, entry, raymem.types.Selection(stream="alice"))
    table = cold.tables.open(f"journal-{entry.id}")
    before = inspect(Files(cold.tables), evidence)

    table.delete("stream = 'alice'")

    # a delete of LanceDB's own takes the rows out of sight and leaves all of their bytes
    assert table.count_rows("stream = 'alice'") == 0
    assert inspect(Files(cold.tables), evidence).found == before.found == 66


def test_a_file_that_can_not_be_decoded_is_no_clean_file(store, tiny, cold):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.erase(stream="alice")
    entry = cold.catalog.get("lab/a")
    evidence = dataclasses.replace(erasure.find(cold, entry, raymem.types.Selection(stream="alice")))
    folder = Path(cold.uri) / f"journal-{entry.id}-{entry.generation}.lance" / "data"
    (folder / "torn.lance").write_bytes(b"half a row")

    assert inspect(Files(cold.tables), evidence).unreadable == 1


def test_a_failure_before_the_switch_erases_nothing(store, tiny, cold, monkeypatch):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    before, there = bank.digest(), folders(cold)
    with monkeypatch.context() as patched:
        patched.setattr(erasure, "switch", _fails)
        with pytest.raises(raymem.errors.StorageError):
            bank.erase(stream="alice")

    assert bank.digest() == before
    assert folders(cold) == there
    assert [receipt.status for receipt in bank.receipts()] == ["undone"]
    assert bank.write(tiny.talk("alice", 33, run="r1")).duplicates == 33
    assert bank.erase(stream="alice").status == "complete"


@pytest.mark.parametrize("verb", ["erase", "materialise"])
def test_a_failure_after_the_switch_loses_nothing_that_is_written_or_erased_then(store, tiny, cold, monkeypatch, verb):
    parent = bank_of(store, tiny, "a", "spalm", "alice", "bob", "carol")
    bank = store.fork(parent.name, "lab/fork") if verb == "materialise" else parent
    bank.write(tiny.talk("bob", 5, run="r3"))
    claim, switched = Journal.claim, cold.catalog.get(bank.name).generation

    def fails(journal: Journal, entry: Entry, log: Log | None) -> None:
        if cold.catalog.get(bank.name).generation > switched:
            raise raymem.errors.StorageError("the disk is full")
        claim(journal, entry, log)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "claim", fails)
        with pytest.raises(raymem.errors.StorageError):
            bank.materialise() if verb == "materialise" else bank.erase(stream="alice")

    assert names(bank, tiny, "alice").isdisjoint({"alice"} if verb == "erase" else {})
    assert bank.write(tiny.talk("bob", 7, run="r3")).duplicates == 5
    # written small, it lies in the log: of the journal that there is now
    assert bank.erase(stream="carol").status == "complete"
    digest = bank.digest()
    bank.detach()
    bank.attach()
    assert bank.digest() == digest
    rows = [row for part in cold.journal(cold.catalog.get(bank.name)).scan() for row in part.streams]
    assert Counter(rows) == {"bob": 73} | ({"alice": 66} if verb == "materialise" else {})


def _fails(*_: Any) -> None:
    raise raymem.errors.StorageError("the disk is full")


def test_receipts_outlive_their_bank(store, tiny):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    receipt = bank.erase(stream="alice")
    store.delete("lab/a")

    assert bank.receipts() == [receipt]
    assert "exported" in receipt.out_of_reach[0]


def test_reads_are_answered_while_rows_are_erased(store, tiny, monkeypatch):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    answered: list[Callable[[], int]] = []
    switch = erasure.switch

    def reading(*args: Any) -> Any:
        answered.append(len(store._async.backend.host._owners["lab/a"].primary.read(tiny.trace(3).hidden, 4)))
        return switch(*args)

    monkeypatch.setattr(erasure, "switch", reading)
    monkeypatch.setattr(raymem.types.Readout, "__len__", lambda self: len(self.relevance_Q), raising=False)
    bank.erase(stream="alice")

    assert answered == [3]


@pytest.mark.parametrize("name", ["lab/a", "lab/fork"])
def test_a_bank_is_not_exported_half_before_an_erasure_and_half_after(store, tiny, cold, tmp_path, name):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    store.fork("lab/a", "lab/fork")
    file = tmp_path / "a.raymem"

    with pytest.raises(Conflict, match=f"rows of bank '{name}' were erased while it was read: do it"):
        export_bank(cold, name, file, lambda done, rows: bank.erase(stream="alice"))
    assert not file.exists()
    assert export_bank(cold, name, file).rows == 66

    with pytest.raises(BankNotFound, match="removed while it was read"):
        export_bank(cold, "lab/fork", file, lambda done, rows: store.delete("lab/fork"))


@pytest.mark.parametrize("rebuild", [True, False])
def test_banks_are_not_merged_half_before_an_erasure_and_half_after(store, tiny, cold, monkeypatch, rebuild):
    bank = bank_of(store, tiny, "a", "larimar", "alice", "bob")
    merged = merging.merged

    def erased_meanwhile(*args: Any) -> Iterator[pa.Table]:
        yield from merged(*args)
        bank.erase(stream="alice")

    monkeypatch.setattr(merging, "merged", erased_meanwhile)
    with pytest.raises(Conflict, match="erased while it was read"):
        merging.merge_banks(cold, "lab/all", ["lab/a"], rebuild=rebuild, rename=True)
    assert [info.name for info in store.banks()] == ["lab/a"]
    assert all(cold.catalog.get("lab/a").id in folder for folder in folders(cold))


def test_a_scan_goes_on_in_the_journal_that_an_erasure_left(store, tiny, cold):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    scan = cold.journal(cold.catalog.get("lab/a")).scan(batch_rows=11)
    first = next(scan)
    bank.erase(stream="alice")
    left = [first, *scan]

    positions = [pos for rows in left for pos in rows.pos_T.tolist()]
    assert positions == sorted(set(positions))
    assert sum(rows.streams.count("bob") for rows in left) == 66


def test_a_journal_with_holes_is_read_from_any_position_to_any_other(store, tiny, cold):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    fork = store.fork(bank.name, "lab/fork", 50)
    fill(fork, tiny, "carol")
    for each in (bank, fork):
        each.erase(stream="alice", run="r1")
        each.erase(stream="carol", run="r2")
        each.erase(stream="bob", run="r2", seq_from=30)
        each.detach()
        journal = cold.journal(cold.catalog.get(each.name))
        there = [pos for rows in journal.scan(0) for pos in rows.pos_T.tolist()]
        assert 33 < len(there) < there[-1] < journal.end() - 1
        for start in range(0, journal.end() + 2, 31):
            for stop in (None, *range(0, journal.end() + 20, 37)):
                found = [pos for rows in journal.scan(start, stop, 16) for pos in rows.pos_T.tolist()]
                assert found == [pos for pos in there if start <= pos and (stop is None or pos < stop)]


@pytest.mark.parametrize("kind", ["spalm", "titans"])
def test_a_parent_is_erased_in_its_forks_too(store, tiny, cold, kind):
    bank = bank_of(store, tiny, "a", kind, "alice", "bob")
    store.fork("lab/a", "lab/fork")
    store.fork("lab/fork", "lab/grandchild")
    fork, grandchild = store.bank("lab/fork"), store.bank("lab/grandchild")
    for forked in (fork, grandchild):
        forked.attach()
        forked.write(tiny.talk("alice", 9, run="r3"))
    never = store.create("lab/never", tiny.spec(kind))
    fill(never, tiny, "bob")

    receipt = bank.erase(stream="alice", rebuild=True)

    assert (receipt.status, set(receipt.forks)) == ("complete", {"lab/fork", "lab/grandchild"})
    assert [found.rows for found in fork.receipts()] == [66 + 9]
    queries = tiny.talk("bob", 33, run="r1").hidden
    for forked in (bank, fork, grandchild):
        assert forked.info().rows == 66
        assert torch.equal(forked.read(queries, 4).scores_Qk, never.read(queries, 4).scores_Qk)
        before = forked.digest()
        forked.detach()
        forked.attach()
        assert forked.digest() == before


def test_erasing_in_a_fork_leaves_its_parent_alone(store, tiny, cold):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    store.fork("lab/a", "lab/fork")
    fork = store.bank("lab/fork")
    fork.attach()
    fork.write(tiny.talk("carol", 9, run="r"))
    before = bank.digest()

    assert fork.erase(stream="alice").status == "complete"

    assert (bank.info().rows, bank.digest()) == (132, before)
    assert fork.info().rows == 66 + 9
    assert cold.catalog.get("lab/fork").parent is None


def test_a_fork_that_could_not_be_erased_keeps_the_receipt_open(store, tiny, monkeypatch):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    store.fork("lab/a", "lab/fork")
    store.bank("lab/fork").attach()
    # beneath the layer of partitions, where erasures reach forks
    backend = store._async.backend
    ask = backend.ask

    async def refusing(name: str, verb: str, *args: Any) -> Any:
        if (name, verb) == ("lab/fork", "erase"):
            raise raymem.errors.StorageError("its node is away")
        return await ask(name, verb, *args)

    with monkeypatch.context() as patched:
        patched.setattr(backend, "ask", refusing)
        receipt = bank.erase(stream="alice")

    assert (receipt.status, receipt.forks) == ("pending", {"lab/fork": ""})
    assert "lab/fork" in receipt.reason
    assert [found.status for found in store.sweep().receipts] == ["complete"]
    assert store.bank("lab/fork").info().rows == 66


def test_a_bank_with_erased_rows_can_be_tagged_read_as_it_was_and_materialised(store, tiny):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.tag("full")
    bank.erase(stream="alice")
    bank.write(tiny.talk("carol", 9, run="r"))
    queries = tiny.talk("alice", 33, run="r1").hidden

    assert {row.stream for q in range(33) for row in bank.read(queries, 8, as_of="full").rows(q)} == {"bob"}
    store.fork("lab/a", "lab/fork", at="full")
    fork = store.bank("lab/fork")
    fork.materialise()
    fork.attach()
    assert fork.info().rows == 66
    assert fork.write(tiny.talk("dora", 3, run="r")).end == 132 + 3


def test_a_bank_with_erased_rows_is_carried_in_a_file(store, tiny, tmp_path):
    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    bank.erase(stream="bob")
    bank.export(tmp_path / "a.raymem")

    copy = store.import_(tmp_path / "a.raymem", "lab/copy")
    copy.attach()

    assert copy.digest() == bank.digest()
    assert (copy.info().rows, copy.write(tiny.talk("dora", 5, run="r")).end) == (66, 132 + 5)


def test_a_file_of_the_first_version_imports_for_ever(store):
    file = Path(__file__).parents[1] / "fixtures" / "version1.raymem"

    old = store.import_(file, "lab/old")
    info = old.attach()

    assert (info.rows, info.tags) == (14, {"after-alice": 7, "after-bob": 14})
    assert old.tokens("alice", "r", 0, 7).shape == (7,)
    # what the release that wrote it said of the bank
    assert old.digest() == "1b92082939c320136ee7af2827a596985706705eeb823b0772c93a1938fce13f"


CUTS = {
    # where the process dies, and whether the rows are erased then
    "before the rewriting": ("raymem.storage.tables.tables.Tables.fill", "before", False),
    "after the rewriting": ("raymem.storage.tables.tables.Tables.fill", "after", False),
    "before the switch": ("raymem.storage.catalog.Catalog.change", "before", False),
    "after the switch": ("raymem.storage.catalog.Catalog.change", "after", True),
    "between two deletions": ("raymem.storage.tables.tables.Tables.drop", "after", True),
}


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory, root) -> tuple[str, dict[str, Path]]:
    """The digest of a bank, and for each cut its store as a killed process left it."""
    folder, settings = tmp_path_factory.mktemp("killed"), Settings(cold=ColdSettings(sync="none"))
    with raymem.connect(folder / "whole", settings=settings) as store:
        store.put_calibration(tiny.calibration)
        bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
        whole = bank.digest()
        bank.detach()
        bank.attach()
    lines = []
    for number, (target, when, _) in enumerate(CUTS.values()):
        shutil.copytree(folder / "whole", folder / str(number))
        lines.append(f"{folder / str(number)} {target} {when}\n")
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("eraser.py"))],
        env=os.environ | {"PYTHONPATH": str(root)}, input="".join(lines), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.stdout.split() == [str(-signal.SIGKILL)] * len(CUTS), ran.stderr
    return whole, {cut: folder / str(number) for number, cut in enumerate(CUTS)}


@pytest.mark.parametrize("cut", CUTS)
def test_a_process_killed_while_it_erases_leaves_all_or_nothing(killed, settings, tiny, cut):
    whole, folder, erased = killed[0], killed[1][cut], CUTS[cut][2]
    with raymem.connect(folder, settings=settings) as again:
        bank = again.bank("lab/a")
        bank.attach()
        assert bank.info().rows == (66 if erased else 132)
        assert (bank.digest() == whole) != erased
        assert [receipt.status for receipt in bank.receipts()] == ["pending"]

        swept = again.sweep()

        assert [receipt.status for receipt in swept.receipts] == ["complete" if erased else "undone"]
        entry = ColdStore.open(str(folder), "none").catalog.get("lab/a")
        named = {f"{kind}-{entry.id}" + (f"-{entry.generation}" if erased else "") for kind in ("journal", "snapshots")}
        assert folders(again._async.backend.cold) <= named
        assert bank.write(tiny.talk("dora", 5, run="r")).end == 132 + 5
        assert bank.erase(stream="alice").rows == (0 if erased else 66)


def test_rows_expire_in_batches_and_with_a_receipt(tiny, tmp_path):
    quick = Settings(cold=ColdSettings(sync="none", expire_s=0.2))
    with raymem.connect(tmp_path, settings=quick) as store:
        store.put_calibration(tiny.calibration)
        banks = [bank_of(store, tiny, name, kind, "alice") for name, kind in (("a", "spalm"), ("b", "titans"))]
        for bank in banks:
            bank.write(tiny.talk("late", 7, run="r", time=time.time()))
            bank.set_ttl(3600)
        kept = bank_of(store, tiny, "kept", "spalm", "alice")
        until = time.monotonic() + 30
        while any(bank.info().rows > 7 for bank in banks) and time.monotonic() < until:
            time.sleep(0.05)

        assert [bank.info().rows for bank in (*banks, kept)] == [7, 7, 66]
        assert [[receipt.rows for receipt in bank.receipts()] for bank in (*banks, kept)] == [[66], [66], []]


def test_a_follower_forgets_what_its_bank_was_made_to_forget(store, tiny, tmp_path):
    from raymem.serving.vllm.follower import Follower

    bank = bank_of(store, tiny, "a", "spalm", "alice", "bob")
    follower = Follower(str(tmp_path), "lab/a", "cpu", lambda fingerprint: None, poll_s=60)
    try:
        bank.erase(stream="alice")
        follower.catch_up()
        readout = follower.read([ContextRows(tiny.talk("alice", 33, run="r1").hidden, 1)], 8)
    finally:
        follower._stop.set()

    assert {row.stream for query in range(33) for row in readout.rows(query)} == {"bob"}


def test_rows_that_were_flushed_leave_the_log_though_another_banks_older_ones_wait_in_it(store, tiny):
    fill(store.create("a/other", tiny.spec("spalm")), tiny, "kept")
    bank = store.create("a/one", tiny.spec("spalm"))
    fill(bank, tiny, "kept", "gone")

    receipt = bank.erase(stream="gone")

    assert (receipt.status, receipt.proves) == ("complete", True)
