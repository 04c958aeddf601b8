"""The journal keeps acknowledged rows, in order, for one writer at a time."""

import os
import signal
from datetime import timedelta
from typing import Any

import pytest
import torch
from lance import LanceDataset

from raymem.errors import BankNotFound, Corrupt, NotOwner, Overloaded, StorageError
from raymem.rows import JournalRows
from raymem.storage.journal import journal as journal_module
from raymem.storage.journal.journal import Journal
from raymem.storage.store import ColdStore
from raymem.storage.tables import single_writer_table as fenced
from raymem.storage.tables.single_writer_table import SingleWriterTable
from raymem.types import BankSpec


def positions(journal: Journal, *args: int) -> list[int]:
    return [pos for rows in journal.scan(*args) for pos in rows.pos_T.tolist()]


def test_rows_come_back_bit_for_bit_through_another_handle(store: ColdStore, journal: Journal, rows):
    parts = [rows(5, 0), rows(1, 5, stream="it's", values=4), rows(7, 6, run="b", values=4)]
    journal.append(parts[0])
    journal.append(*parts[1:])
    fresh = ColdStore.open(store.uri)
    scanned = list(fresh.journal(fresh.catalog.get("lab/a")).scan())
    assert [len(piece) for piece in scanned] == [5, 8]
    for name in ("pos_T", "seq_T", "token_T", "hidden_TLD", "time_T", "crc_T"):
        assert torch.equal(
            torch.cat([getattr(piece, name) for piece in scanned]), torch.cat([getattr(part, name) for part in parts])
        ), name
    assert scanned[0].value_TV is None
    assert torch.equal(scanned[1].value_TV, torch.cat([part.value_TV for part in parts[1:]]))
    assert scanned[1].streams == ["it's"] + ["s"] * 7
    assert scanned[1].runs == ["r"] + ["b"] * 7


def test_an_empty_journal_ends_at_zero(journal: Journal, rows):
    assert (journal.end(), positions(journal)) == (0, [])
    journal.append()
    journal.append(rows(0, 0))
    assert journal.stats()["rows"] == 0


@pytest.mark.parametrize("batch_rows", [1, 4, 1000])
def test_a_scan_gives_the_range_asked_for(journal: Journal, rows, batch_rows: int):
    for pos in range(0, 30, 3):
        journal.append(rows(3, pos))
    assert positions(journal, 0, None, batch_rows) == list(range(30))
    assert positions(journal, 7, 23, batch_rows) == list(range(7, 23))
    assert positions(journal, 29) == [29]
    assert positions(journal, 30) == []
    assert max(map(len, journal.scan(batch_rows=batch_rows))) <= max(3, batch_rows + 2)


def test_find_tells_which_rows_are_there(journal: Journal, rows):
    mine, other = rows(6, 0, stream="it's"), rows(6, 6, stream="it's", run="other")
    journal.append(mine, other)
    assert journal.find("it's", "r", 2, 5) == dict(zip([2, 3, 4], mine.crc_T[2:5].tolist(), strict=True))
    assert journal.find("it's", "other", 0, 7) == {6: int(other.crc_T[0])}
    assert journal.find("' OR true --", "r", 0, 100) == {}
    assert torch.equal(journal.tokens("it's", "r", 2, 9), mine.token_T[2:])


def test_stats_count_what_is_there(journal: Journal, rows):
    journal.append(rows(5, 0))
    journal.append(rows(4, 5))
    stats = journal.stats()
    assert (stats["rows"], stats["fragments"]) == (9, 2)
    assert stats["bytes"] > 9 * 2 * 9 * 2


def test_a_lost_journal_is_an_error_and_not_an_empty_bank(store: ColdStore, journal: Journal, rows):
    journal.append(rows(3, 0))
    store.tables.drop(f"journal-{store.catalog.get('lab/a').id}")
    for use in (journal.end, lambda: list(journal.scan()), journal.fence):
        with pytest.raises(Corrupt, match="not found"):
            use()


def test_rows_that_do_not_follow_are_refused(journal: Journal, rows):
    journal.append(rows(3, 0))
    with pytest.raises(StorageError, match="ends at position 3, not 5"):
        journal.append(rows(1, 5))
    journal.append(rows(1, 3))
    assert positions(journal) == [0, 1, 2, 3]


def take_over(store: ColdStore, owner: str) -> Journal:
    entry = store.catalog.get("lab/a")
    taken = store.journal(store.catalog.claim("lab/a", owner, entry.epoch))
    taken.fence()
    return taken


def test_an_old_owner_can_not_append_after_a_new_one_fenced(store: ColdStore, journal: Journal, rows):
    journal.append(rows(3, 0))
    new = take_over(store, "new")
    for _ in range(2):
        with pytest.raises(NotOwner):
            journal.append(rows(2, 3))
    assert new.end() == 3
    new.append(rows(4, 3))
    assert positions(new) == list(range(7))


@pytest.fixture
def _keep_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fenced, "_KEEP_VERSIONS", timedelta(0))


@pytest.mark.usefixtures("_keep_no_version")
def test_the_fence_outlives_compaction(store: ColdStore, journal: Journal, rows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "_COMPACT_EVERY", 5)
    journal.append(rows(3, 0))
    new = take_over(store, "new")
    compacted = 0
    for pos in range(3, 19):
        new.append(rows(1, pos))
        compacted += new.maintain()
    # each leaves one fragment that the next can add to
    assert compacted == 4
    # nothing of the version that the old owner knows is left
    table = store.tables.open(f"journal-{store.catalog.get('lab/a').id}")
    assert len(table.list_versions()) < 5
    with pytest.raises(NotOwner):
        journal.append(rows(2, 3))
    assert positions(new) == list(range(19))


def test_an_old_owner_can_not_compact_either(store: ColdStore, journal: Journal, rows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "_COMPACT_EVERY", 2)
    for pos in range(3):
        journal.append(rows(1, pos))
    new = take_over(store, "new")
    new.append(rows(5, 3))
    with pytest.raises(NotOwner):
        journal.maintain()
    new.append(rows(1, 8))
    assert positions(new) == list(range(9))


def test_rows_committed_while_a_fence_goes_up_are_kept(store: ColdStore, journal: Journal, rows, looked):
    journal.append(rows(3, 0))

    def quicker() -> None:
        journal.append(rows(2, 3))
        journal.append(rows(2, 5))

    looked(quicker)
    new = take_over(store, "new")
    assert (new.end(), new.counted()) == (7, 7)
    new.append(rows(1, 7))
    assert positions(new) == list(range(8))
    with pytest.raises(NotOwner):
        journal.append(rows(1, 7))


def test_a_fence_that_comes_late_hides_nothing_and_stops_nobody(
    store: ColdStore, journal: Journal, rows, monkeypatch: pytest.MonkeyPatch
):
    journal.append(rows(3, 0))
    bar, newer = SingleWriterTable._bar, []

    def killed_after_it(*looked: Any) -> bool:
        monkeypatch.setattr(SingleWriterTable, "_bar", bar)
        newer.append(take_over(store, "newer"))
        newer[0].append(rows(2, 3))
        bar(*looked)
        raise KeyboardInterrupt

    monkeypatch.setattr(SingleWriterTable, "_bar", killed_after_it)
    with pytest.raises(KeyboardInterrupt):
        take_over(store, "new")
    assert positions(journal) == list(range(5))
    newer[0].append(rows(1, 5))
    assert positions(newer[0]) == list(range(6))


def test_a_fence_that_meets_a_clean_up_can_be_tried_again(
    store: ColdStore, journal: Journal, rows, monkeypatch: pytest.MonkeyPatch
):
    journal.append(rows(3, 0))
    opened = SingleWriterTable._dataset

    def too_late(table: SingleWriterTable, handle: Any) -> Any:
        monkeypatch.setattr(SingleWriterTable, "_dataset", opened)
        journal.append(rows(2, 3))
        store.tables.open(table.name).to_lance().cleanup_old_versions(older_than=timedelta(0))
        return opened(table, handle)

    monkeypatch.setattr(SingleWriterTable, "_dataset", too_late)
    # and not Corrupt: nothing is damaged
    with pytest.raises(StorageError):
        take_over(store, "new")
    assert positions(take_over(store, "new")) == list(range(5))


def test_a_fence_that_comes_after_the_bank_went_says_so(store: ColdStore, journal: Journal, rows, looked):
    journal.append(rows(3, 0))
    looked(lambda: store.remove("lab/a"))
    with pytest.raises(BankNotFound):
        take_over(store, "new")


def test_a_refused_compaction_does_not_stop_the_owner_in_its_own(
    store: ColdStore, journal: Journal, rows, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(journal_module, "_COMPACT_EVERY", 2)
    for pos in range(3):
        journal.append(rows(1, pos))
    new = take_over(store, "new")
    new.append(rows(1, 3))
    latest = SingleWriterTable._is_latest

    def crossed(*committed: Any) -> bool:
        monkeypatch.setattr(SingleWriterTable, "_is_latest", latest)
        with pytest.raises(NotOwner):
            journal.maintain()
        return latest(*committed)

    monkeypatch.setattr(SingleWriterTable, "_is_latest", crossed)
    assert new.maintain()
    new.append(rows(1, 4))
    assert positions(new) == list(range(5))


def test_an_append_that_crossed_another_is_not_acknowledged(store: ColdStore, journal: Journal, rows):
    journal.append(rows(3, 0))
    # no fence stops this one: it has just been opened
    store.tables.open(f"journal-{journal.entry.id}").add(rows(1, 3, run="x").to_arrow())
    with pytest.raises(NotOwner):
        journal.append(rows(1, 3))


def test_of_two_who_fence_at_once_the_catalog_says_who_goes_on(store: ColdStore, journal: Journal, rows, looked):
    journal.append(rows(3, 0))
    newer: list[Journal] = []
    looked(lambda: newer.append(take_over(store, "newer")))
    with pytest.raises(NotOwner, match="epoch"):
        take_over(store, "new")
    # that one's fence came last all the same, and this one has to put up another
    with pytest.raises(NotOwner):
        newer[0].append(rows(1, 3))
    newer[0].append(rows(1, 3))
    assert positions(newer[0]) == list(range(4))


def test_a_fence_gives_up_where_others_are_always_first(store: ColdStore, journal: Journal, monkeypatch):
    monkeypatch.setattr(fenced, "SWAP_ATTEMPTS", 3)
    table = store.tables.open(f"journal-{store.catalog.get('lab/a').id}")
    bar, tries = SingleWriterTable._bar, []

    def beaten(table_: SingleWriterTable, handle: Any, dataset: Any) -> bool:
        table.checkout_latest()
        table.add(table.to_arrow())
        tries.append(bar(table_, handle, dataset))
        return tries[-1]

    monkeypatch.setattr(SingleWriterTable, "_bar", beaten)
    with pytest.raises(Overloaded, match="all the time; try again"):
        take_over(store, "new")
    assert tries == [False] * 3


@pytest.mark.usefixtures("_keep_no_version")
def test_who_stood_still_in_a_clean_up_while_another_took_over_appends_nothing(
    store: ColdStore, journal: Journal, rows, monkeypatch: pytest.MonkeyPatch
):
    for pos in range(3):
        journal.append(rows(1, pos))
    clean = LanceDataset.cleanup_old_versions

    def late(self: LanceDataset, **options: Any) -> object:
        monkeypatch.setattr(LanceDataset, "cleanup_old_versions", clean)
        take_over(store, "new").append(rows(1, 3))
        return clean(self, **options)

    monkeypatch.setattr(journal_module, "_COMPACT_EVERY", 2)
    monkeypatch.setattr(LanceDataset, "cleanup_old_versions", late)
    # the fence is not the latest version, and stays all the same
    assert journal.maintain()
    with pytest.raises(NotOwner):
        journal.append(rows(1, 3))
    assert positions(store.journal(store.catalog.get("lab/a"))) == list(range(4))


def test_an_owner_of_yesterday_can_not_fence(store: ColdStore, journal: Journal, rows):
    new = take_over(store, "new")
    with pytest.raises(NotOwner, match="epoch 1"):
        journal.fence()
    new.append(rows(1, 0))
    store.remove("lab/a")
    with pytest.raises(BankNotFound):
        journal.fence()


@pytest.mark.usefixtures("_keep_no_version")
def test_a_reader_survives_compaction(journal: Journal, rows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "_COMPACT_EVERY", 60)
    for pos in range(0, 120, 2):
        journal.append(rows(2, pos))
    scan = journal.scan(batch_rows=8)
    seen = next(scan).pos_T.tolist()
    assert journal.maintain()
    assert journal.stats()["fragments"] == 1
    seen += [pos for part in scan for pos in part.pos_T.tolist()]
    assert seen == list(range(120))


def test_compaction_happens_by_count_and_keeps_everything(journal: Journal, rows):
    for pos in range(128):
        assert not journal.maintain()
        journal.append(rows(1, pos))
    assert journal.maintain()
    assert not journal.maintain()
    journal.append(rows(1, 128))
    assert journal.stats()["fragments"] == 2
    assert positions(journal) == list(range(129))


def test_killed_writers_lose_and_double_nothing(store: ColdStore, spec: BankSpec, worker):
    store.catalog.create("lab/a", spec)
    journal = store.journal(store.catalog.get("lab/a"))
    acknowledged = 0
    for kill_after in (9, 140):
        writer = worker("append", store.uri, "lab/a")
        for _ in range(kill_after):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        # not communicate, which leaves out what readline has read ahead
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
        writer.wait()
        scanned = list(journal.scan())
        got: list[int] = torch.cat([rows.pos_T for rows in scanned]).tolist()
        # at most the commit in flight is there without having been acknowledged
        assert got == list(range(len(got)))
        assert acknowledged <= len(got) <= acknowledged + 7
        hidden = torch.cat([rows.hidden_TLD[:, 0, 0] for rows in scanned])
        assert torch.equal(hidden, torch.arange(len(got)).bfloat16())
    assert {rows.epoch for rows in scanned} == {1, 2}


def test_a_scan_checks_order(journal: Journal, rows, monkeypatch: pytest.MonkeyPatch):
    journal.append(rows(4, 0))
    journal._flushed_end = 6
    journal.append(rows(4, 6))
    with pytest.raises(Corrupt, match="position 6 where 4 belongs") as caught:
        positions(journal)
    assert caught.value.details["pos"] == 4
    with pytest.raises(Corrupt, match="8 rows but ends at position 10"):
        journal.end()


def test_a_row_of_another_shape_is_refused(journal: Journal, rows):
    part = rows(2, 0)
    wide = JournalRows(**(vars(part) | {"hidden_TLD": torch.zeros(2, 2, 10).bfloat16()}))
    with pytest.raises(StorageError):
        journal.append(wide)
    assert journal.end() == 0
