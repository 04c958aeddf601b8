"""The log of a host: small groups of rows of many banks in one commit, and every reader sees them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lance import LanceDataset
from lance.dataset import DatasetOptimizer
from lancedb.table import LanceTable

from raymem.errors import Conflict, Corrupt, NotOwner, Overloaded, StorageError
from raymem.rows import JournalRows, Trace
from raymem.storage.history import fork_at
from raymem.storage.journal import journal as journal_module
from raymem.storage.journal import log as log_module
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.log import Log
from raymem.storage.store import ColdStore
from raymem.storage.tables.disk import reading
from raymem.storage.tables.files import Files
from raymem.storage.tables.single_writer_table import SingleWriterTable, WriterState
from raymem.storage.tables.tables import log_table
from raymem.types import BankSpec, Fingerprint

Owned = Callable[..., Journal]


def make_log(store: ColdStore, id: str) -> Log:
    log = Log(store.tables, id)
    log.create()
    return log


@pytest.fixture
def log(store: ColdStore) -> Log:
    return make_log(store, "first")


def logged(log: Log, journal: Journal, rows: JournalRows) -> None:
    assert journal.accept(rows)
    log.commit([(journal.entry, rows)])


def positions(journal: Journal, *args: int) -> list[int]:
    return [pos for rows in journal.scan(*args) for pos in rows.pos_T.tolist()]


def fresh(store: ColdStore, name: str = "lab/a") -> Journal:
    """What another process reads."""
    other = ColdStore.open(store.uri)
    return other.journal(other.catalog.get(name))


def flushed_rows(store: ColdStore, journal: Journal) -> int:
    return int(store.tables.open(f"journal-{journal.entry.id}").count_rows())


def test_unflushed_rows_are_seen_by_everyone(store: ColdStore, log: Log, owned: Owned, rows):
    journal = owned(log)
    first, second = rows(3, 0), rows(4, 3, run="other")
    logged(log, journal, first)
    logged(log, journal, second)
    assert flushed_rows(store, journal) == 0
    for reader in (journal, fresh(store)):
        assert reader.end() == 7
        assert positions(reader) == list(range(7))
        assert positions(reader, 2, 5) == [2, 3, 4]
        assert positions(reader, 7) == []
        assert reader.find("s", "other", 4, 99) == dict(zip([4, 5, 6], second.crc_T[1:].tolist(), strict=True))
        assert torch.equal(reader.tokens("s", "r", 1, 9), first.token_T[1:])


def test_a_reader_from_before_the_take_over_looks_where_the_rows_are_now(
    store: ColdStore, log: Log, owned: Owned, rows
):
    journal = owned(log)
    logged(log, journal, rows(3, 0))
    reader = fresh(store)
    assert reader.end() == 3
    journal.flush()
    store.catalog.release("lab/a", journal.entry.epoch, log=log.id)
    log.drop()
    second = make_log(store, "second")
    logged(second, owned(second), rows(2, 3))
    assert reader.end() == 5
    assert positions(reader) == list(range(5))


def test_rows_of_many_banks_go_into_one_commit_and_come_back_bit_for_bit(store: ColdStore, log: Log, owned: Owned):
    def part(bank: int) -> tuple[Journal, JournalRows]:
        width, layers = 5 + bank, (1, 2, 3)[: 1 + bank % 3]
        dtype = ("bfloat16", "float16", "float32")[bank % 3]
        fingerprint = Fingerprint(model="m", content="c", layers=layers, width=width, tokenizer="t", dtype=dtype)
        journal = owned(log, f"lab/{bank}", BankSpec(kind="spalm", fingerprint=fingerprint))
        hidden = torch.randn(bank % 4 + 1, len(layers), width).to(getattr(torch, dtype))
        values = torch.randn(len(hidden), width) if bank % 2 else None
        trace = Trace(hidden, torch.arange(len(hidden)), f"stream'{bank}", "r", values=values, time=1.5)
        return journal, JournalRows.of(trace, 0, journal.entry.epoch)

    parts = [part(bank) for bank in range(7)]
    before = store.tables.open(log_table(log.id)).version
    log.commit([(journal.entry, rows) for journal, rows in parts])
    assert store.tables.open(log_table(log.id)).version == before + 1
    for journal, rows in parts:
        (found,) = fresh(store, journal.entry.name).scan()
        for name, value in vars(rows).items():
            same = torch.equal(value, getattr(found, name)) if torch.is_tensor(value) else value == getattr(found, name)
            assert same, name


def test_flushing_twice_is_harmless(store: ColdStore, log: Log, owned: Owned, rows):
    journal = owned(log)
    for pos in (0, 2):
        logged(log, journal, rows(2, pos))
    journal.flush()
    journal.flush()
    assert flushed_rows(store, journal) == 4
    assert log.nbytes == 0
    # the log's table still has the rows: they count once
    assert int(store.tables.open(log_table(log.id)).count_rows()) == 4
    assert positions(fresh(store)) == positions(journal) == [0, 1, 2, 3]
    logged(log, journal, rows(2, 4))
    assert positions(fresh(store)) == list(range(6))


def test_large_groups_go_to_the_table_with_what_the_log_holds_before_them(
    store: ColdStore, log: Log, owned: Owned, rows
):
    journal = owned(log)
    logged(log, journal, rows(3, 0))
    large = rows(40_000, 3)
    assert not journal.accept(large)
    journal.append(large)
    assert flushed_rows(store, journal) == 40_003
    logged(log, journal, rows(1, 40_003))
    assert fresh(store).end() == 40_004
    assert log.nbytes == rows(1, 0).nbytes


def test_a_full_log_is_passed_by(store: ColdStore, log: Log, owned: Owned, rows):
    journal, other = owned(log), owned(log, "lab/b")
    logged(log, journal, rows(9, 0))
    log.limit = log.nbytes
    assert not other.accept(rows(1, 0))
    other.append(rows(1, 0))
    journal.flush()
    assert other.accept(rows(1, 1))


def test_a_take_over_flushes_and_stops_the_earlier_owner_for_good(store: ColdStore, log: Log, owned: Owned, rows):
    old, other = owned(log), owned(log, "lab/b")
    logged(log, old, rows(3, 0))
    logged(log, other, rows(2, 0))
    second = make_log(store, "second")
    new = owned(second)
    assert (flushed_rows(store, new), new.end()) == (3, 3)
    assert store.catalog.get("lab/a").log == "second"
    logged(second, new, rows(2, 3))
    # nothing more through the log, for no bank; and this one's table is shut too
    for journal, pos in ((old, 3), (other, 2)):
        with pytest.raises(NotOwner):
            log.commit([(journal.entry, rows(1, pos))])
    with pytest.raises(NotOwner):
        log.purge()
    with pytest.raises(NotOwner):
        old.append(rows(1, 3))
    assert log.state is WriterState.LOST
    # the bank that was not taken lost nothing, and comes back under another log
    assert fresh(store, "lab/b").end() == 2
    again = owned(second, "lab/b")
    assert (again.end(), store.catalog.get("lab/b").log) == (2, "second")
    assert positions(new) == list(range(5))


def test_a_fenced_log_stays_fenced_after_its_owner_looked_again(store: ColdStore, log: Log, owned: Owned, rows):
    journal = owned(log)
    logged(log, journal, rows(3, 0))
    owned(make_log(store, "second"))
    # whatever broke the handle, the next one is made from the latest version: the fence is found there
    log.state = WriterState.IN_DOUBT
    with pytest.raises(NotOwner):
        log.commit([(journal.entry, rows(1, 3))])
    assert int(store.tables.open(log_table("first")).count_rows()) == 3


def test_a_take_over_that_dies_half_way_is_taken_up_by_the_next(
    store: ColdStore, log: Log, owned: Owned, rows, monkeypatch
):
    logged(log, owned(log), rows(3, 0))

    def die(*args: object, **values: object) -> None:
        raise StorageError("killed before the catalog says that the old log is empty")

    with monkeypatch.context() as patch:
        patch.setattr(store.catalog, "change", die)
        with pytest.raises(StorageError):
            owned(make_log(store, "second"))
    assert store.catalog.get("lab/a").log == "first"
    assert positions(fresh(store)) == [0, 1, 2]
    third = owned(make_log(store, "third"))
    assert (flushed_rows(store, third), store.catalog.get("lab/a").log) == (3, "third")


def test_a_hand_over_leaves_the_log_of_the_source_alone(store: ColdStore, log: Log, owned: Owned, rows):
    journal, other = owned(log), owned(log, "lab/b")
    logged(log, journal, rows(3, 0))
    journal.let_go()
    assert positions(journal) == [0, 1, 2]
    second = make_log(store, "second")
    logged(second, owned(second, flushed=log), rows(1, 3))
    assert store.catalog.get("lab/a").log == "second"
    logged(log, other, rows(2, 0))
    assert log.state is not WriterState.LOST
    with pytest.raises(NotOwner):
        journal.append(rows(1, 3))


def test_an_owner_takes_the_journal_back_after_a_hand_over_that_came_to_nothing(
    store: ColdStore, log: Log, owned: Owned, rows
):
    journal = owned(log)
    logged(log, journal, rows(3, 0))
    journal.let_go()
    logged(log, journal, rows(2, 3))
    assert store.catalog.get("lab/a").log == "first"
    assert fresh(store).end() == 5


@pytest.mark.parametrize("landed", [True, False])
def test_a_failed_commit_is_looked_for_before_the_next(
    log: Log, store: ColdStore, owned: Owned, rows, monkeypatch, landed
):
    journal = owned(log)
    logged(log, journal, rows(3, 0))

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error", "disk")

    with monkeypatch.context() as patch:
        if landed:
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(type(log._table._handle), "add", fail)
        with pytest.raises(StorageError):
            log.commit([(journal.entry, rows(2, 3))])
        if landed:
            with pytest.raises(StorageError):
                journal.accept(rows(2, 3))
    assert journal.end() == fresh(store).end() == (5 if landed else 3)
    if landed:
        with pytest.raises(StorageError, match="ends at position 5, not 3"):
            journal.accept(rows(2, 3))
    logged(log, journal, rows(1, 5 if landed else 3))
    assert positions(journal) == positions(fresh(store)) == list(range(6 if landed else 4))


@pytest.mark.parametrize(("owner", "step"), [(SingleWriterTable, "_count"), (Log, "_is_there")])
def test_a_look_for_a_failed_commit_that_fails_itself_is_repeated(
    log: Log, store: ColdStore, owned: Owned, rows, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
):
    journal = owned(log)
    logged(log, journal, rows(1, 0))
    real = LanceTable.add

    def landed(*args: object, **options: object) -> None:
        real(*args, **options)
        raise OSError(5, "Input/output error", "disk")

    def fails(*args: object) -> None:
        raise StorageError("the fragments can't be counted")

    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, "add", landed)
        with pytest.raises(StorageError):
            log.commit([(journal.entry, rows(2, 1))])
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fails)
        with pytest.raises(StorageError, match="counted"):
            journal.counted()
    assert log.state is WriterState.IN_DOUBT
    assert journal.counted() == 3
    logged(log, journal, rows(1, 3))
    assert positions(owned(make_log(store, "second"))) == [0, 1, 2, 3]


def test_upkeep_drops_what_was_flushed_and_keeps_the_rest(store: ColdStore, log: Log, owned: Owned, rows):
    journal, other = owned(log), owned(log, "lab/b")
    logged(log, journal, rows(2, 0))
    journal.flush()
    for pos in range(130):
        logged(log, other, rows(1, pos))
        log.maintain()
    table = store.tables.open(log_table(log.id))
    # the first commit went with what was flushed; one piece for what was left, and what came after
    assert int(table.count_rows(f"bank = '{journal.entry.id}'")) == 0
    assert log.stats()["fragments"] == table.stats()["fragment_stats"]["num_fragments"] <= 5
    assert positions(fresh(store, "lab/b")) == list(range(130))
    other.flush()
    log.purge()
    assert int(store.tables.open(log_table(log.id)).count_rows()) == 0
    assert fresh(store, "lab/b").end() == 130
    assert fresh(store).end() == 2


def in_files(store: ColdStore, id: str) -> set[tuple[str, int]]:
    """Bank and position of every row in any file of a log."""
    files = Files(store.tables)
    found = [batch for file in files.of(log_table(id)) if file.holds_rows for batch in files.rows(file)]
    pairs = [zip(batch["bank"].to_pylist(), batch["pos"].to_pylist(), strict=True) for batch in found]
    return {pair for part in pairs for pair in part}


def test_rows_of_a_bank_that_left_go_from_every_file_and_others_stay(store: ColdStore, log: Log, owned: Owned, rows):
    leaving, staying, back = owned(log), owned(log, "lab/b"), owned(log, "lab/c")
    for journal in (leaving, staying, back):
        logged(log, journal, rows(3, 0))
    for journal in (leaving, back):
        journal.flush()
        log.leave(journal.entry.id)
    logged(log, back, rows(2, 3))
    assert log.left

    assert log.maintain()

    a, b, c = (journal.entry.id for journal in (leaving, staying, back))
    assert in_files(store, "first") == {(b, 0), (b, 1), (b, 2), (c, 3), (c, 4)}
    assert not log.left
    assert not log.maintain()
    assert [positions(journal) for journal in (leaving, staying, back)] == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4]]
    # it had come back, and leaves again
    back.flush()
    log.leave(c)
    assert log.maintain()
    assert in_files(store, "first") == {(b, 0), (b, 1), (b, 2)}
    assert a not in log._last


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["delete", "compact_files", "cleanup_old_versions"])
def test_a_log_goes_on_after_an_upkeep_that_failed_at_any_step(
    log: Log, store: ColdStore, owned: Owned, rows, monkeypatch: pytest.MonkeyPatch, step: str, when: str
):
    gone, journal = owned(log), owned(log, "lab/b")
    logged(log, gone, rows(2, 0))
    gone.flush()
    # two fragments: compaction merges them in two commits
    logged(log, journal, rows(2, 0))
    logged(log, journal, rows(1, 2))
    owner = {"delete": LanceTable, "compact_files": DatasetOptimizer, "cleanup_old_versions": LanceDataset}[step]
    real = getattr(owner, step)

    def fail(*args: object, **options: object) -> None:
        if when == "after":
            real(*args, **options)
        raise OSError(5, "Input/output error", "disk")

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(StorageError):
            log.purge()

    assert positions(journal) == [0, 1, 2]
    logged(log, journal, rows(2, 3))
    log.purge()
    assert in_files(store, "first") == {(journal.entry.id, pos) for pos in range(5)}
    # and still, who takes over stops it
    owned(make_log(store, "second"), "lab/b")
    with pytest.raises(NotOwner):
        log.commit([(journal.entry, rows(1, 5))])
    assert positions(fresh(store, "lab/b")) == [0, 1, 2, 3, 4]


def test_rows_flushed_during_an_upkeep_go_once_their_bank_leaves(
    log: Log, store: ColdStore, owned: Owned, rows, monkeypatch: pytest.MonkeyPatch
):
    gone, journal = owned(log), owned(log, "lab/b")
    logged(log, journal, rows(2, 0))
    logged(log, gone, rows(2, 0))
    gone.flush()
    log.leave(gone.entry.id)
    compact = SingleWriterTable.compact

    def meanwhile(table: SingleWriterTable, **options: Any) -> None:
        if table.name == log_table(log.id):
            journal.flush()
        compact(table, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SingleWriterTable, "compact", meanwhile)
        assert log.maintain()
    assert in_files(store, "first") == {(journal.entry.id, 0), (journal.entry.id, 1)}
    log.leave(journal.entry.id)
    assert log.maintain()
    assert in_files(store, "first") == set()


def test_a_clean_up_that_was_cut_short_harms_nobody_who_takes_over(
    log: Log, store: ColdStore, owned: Owned, rows, monkeypatch: pytest.MonkeyPatch
):
    gone, journal = owned(log), owned(log, "lab/b")
    logged(log, gone, rows(2, 0))
    gone.flush()
    folder = Path(store.uri) / f"{log_table(log.id)}.lance" / "data"
    flushed = set(folder.iterdir())
    logged(log, journal, rows(3, 0))

    def killed(*args: object, **options: object) -> None:
        # the deletion took a whole fragment, so that nothing was compacted: of what it had, files go before versions
        for file in flushed:
            file.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(LanceDataset, "cleanup_old_versions", killed)
    with pytest.raises(KeyboardInterrupt):
        log.purge()
    second = make_log(store, "second")
    taken = owned(second, "lab/b")
    assert positions(taken) == positions(fresh(store, "lab/b")) == [0, 1, 2]
    assert positions(owned(second)) == [0, 1]


def test_a_bank_that_had_no_rows_here_leaves_nothing_to_do(log: Log, owned: Owned):
    log.leave(owned(log).entry.id)
    assert not log.left


def test_one_who_reads_a_log_while_a_bank_leaves_it_finds_the_rows_or_hears_that_they_went(
    store: ColdStore, log: Log, owned: Owned, rows, monkeypatch: pytest.MonkeyPatch
):
    journal = owned(log)
    logged(log, journal, rows(3, 0))
    reader = store.journal(store.catalog.get("lab/a"))
    old = store.tables.open(log_table("first"))
    look = journal_module.read_log

    def leave_first(*args):
        monkeypatch.setattr(journal_module, "read_log", look)
        opened = store.tables.open(log_table("first"))
        journal.flush()
        log.leave(journal.entry.id)
        assert log.maintain()
        with reading("read the log"):
            opened.search().to_arrow()

    monkeypatch.setattr(journal_module, "read_log", leave_first)

    # the first look fails at files that are gone; the second finds the rows where they were flushed to
    assert positions(reader) == [0, 1, 2]
    with pytest.raises(Corrupt) as caught, reading("read an old version"):
        old.search().to_arrow()
    assert caught.value.details["missing"]


def test_a_reader_survives_the_upkeep_of_the_log(store: ColdStore, log: Log, owned: Owned, rows, monkeypatch):
    journal = owned(log)
    logged(log, journal, rows(3, 0))
    reader = fresh(store)
    read = journal_module.read_log

    def late(*args):
        # everything is flushed between the look into the catalog and that into the log
        monkeypatch.setattr(journal_module, "read_log", read)
        journal.flush()
        log.purge()
        return read(*args)

    monkeypatch.setattr(journal_module, "read_log", late)
    assert positions(reader) == [0, 1, 2]


def test_a_lost_log_is_an_error_and_not_a_loss(store: ColdStore, log: Log, owned: Owned, rows):
    logged(log, owned(log), rows(3, 0))
    store.tables.drop(log_table(log.id))
    for use in (fresh(store).end, lambda: positions(fresh(store)), lambda: owned(make_log(store, "second"))):
        with pytest.raises(Corrupt, match="log-first"):
            use()


def test_rows_that_an_erased_generation_left_in_the_log_do_not_count(store: ColdStore, log: Log, owned: Owned, rows):
    journal = owned(log)
    logged(log, journal, rows(5, 0))
    journal.flush()
    entry = store.catalog.change(journal.entry, generation=1)
    kept = rows(2, 0)
    store.tables.fill(f"journal-{entry.id}-1", kept.to_arrow().schema, kept.to_arrow().to_batches())
    assert positions(fresh(store)) == [0, 1]


def test_a_fork_goes_on_where_its_parent_was_flushed_or_not(store: ColdStore, log: Log, owned: Owned, rows):
    journal = owned(log)
    logged(log, journal, rows(3, 0))
    journal.flush()
    logged(log, journal, rows(4, 3))
    fork_at(store, "lab/a", "lab/b", None)
    fork = owned(log, "lab/b")
    assert (fork.end(), positions(fork)) == (7, list(range(7)))
    logged(log, fork, rows(2, 7, run="of the fork"))
    assert positions(fresh(store, "lab/b")) == list(range(9))
    fork.flush()
    assert (fork.end(), flushed_rows(store, fork)) == (9, 2)
    assert positions(fresh(store)) == list(range(7))


def test_fragments_slow_writers_down_before_they_are_too_many(journal: Journal, rows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "_SLOW_FRAGMENTS", 5)
    monkeypatch.setattr(journal_module, "_MAX_FRAGMENTS", 8)
    monkeypatch.setattr(journal_module, "_COMPACT_EVERY", 3)
    compact = type(journal._writer).compact

    def fail(*args: object, **values: object) -> None:
        raise StorageError("the disk is too full to merge anything")

    with monkeypatch.context() as patch:
        patch.setattr(type(journal._writer), "compact", fail)
        for pos in range(8):
            journal.append(rows(1, pos))
        with pytest.raises(Overloaded, match=r"8 pieces.*the disk is too full") as caught:
            journal.append(rows(1, 8))
        assert caught.value.retry_after_s > 0
        assert journal.stats()["fragments"] == 8
    assert type(journal._writer).compact is compact
    journal.append(rows(1, 8))
    assert journal.stats()["fragments"] <= 2
    assert journal.stats()["waits"] == 5
    assert positions(journal) == list(range(9))


def test_a_log_in_too_many_pieces_is_passed_by(log: Log, owned: Owned, rows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log_module, "_FRAGMENTS", 4)
    journal = owned(log)
    for pos in range(4):
        logged(log, journal, rows(1, pos))
    assert not journal.accept(rows(1, 4))
    journal.append(rows(1, 4))
    log.purge()
    assert journal.accept(rows(1, 5))


@pytest.mark.parametrize("where", ["logged", "flushed", "between"])
def test_a_process_killed_at_any_step_of_flushing_loses_and_doubles_nothing(
    store: ColdStore, spec: BankSpec, worker, owned: Owned, where: str
):
    store.catalog.create("lab/a", spec)
    process = worker("log_rows", store.uri, "lab/a", where)
    acknowledged = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert store.catalog.get("lab/a").log == f"of-{process.pid}"
    reader = fresh(store)
    assert positions(reader) == list(range(acknowledged))
    assert flushed_rows(store, reader) == {"logged": 0, "between": acknowledged, "flushed": acknowledged}[where]
    taken = owned(make_log(store, "next"))
    assert positions(taken) == list(range(acknowledged))
    assert flushed_rows(store, taken) == acknowledged
    hidden = torch.cat([rows.hidden_TLD[:, 0, 0] for rows in taken.scan()])
    assert torch.equal(hidden, torch.arange(acknowledged).bfloat16())


def test_two_conflicts_of_the_catalog_do_not_lose_a_log(store: ColdStore, log: Log, owned: Owned, rows):
    logged(log, owned(log), rows(1, 0))
    entry = store.catalog.get("lab/a")
    # whoever claims next keeps the old log's name until it has flushed what is in there
    assert store.catalog.claim("lab/a", "you", entry.epoch, "second").log == "first"
    with pytest.raises(Conflict):
        store.catalog.claim("lab/a", "they", entry.epoch, "third")
    store.catalog.release("lab/a", entry.epoch + 1, log="second")
    assert store.catalog.get("lab/a").log == "first"


def test_a_log_that_no_bank_names_can_be_dropped(store: ColdStore, log: Log, owned: Owned):
    journal = owned(log)
    assert [entry.name for entry in store.catalog.logged("first")] == ["lab/a"]
    store.catalog.release("lab/a", journal.entry.epoch, log="first")
    assert store.catalog.logged("first") == []
    log.drop()
    assert not (Path(store.uri) / f"{log_table('first')}.lance").exists()
