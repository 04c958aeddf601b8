"""Forks in the catalog and in journals, against whoever comes in between."""

import threading
from collections.abc import Callable

import pytest

from raymem.errors import BankNotFound, Conflict, NotOwner, RaymemError
from raymem.storage.history import fork_at, materialise_cold, restore_to
from raymem.storage.store import ColdStore, Entry
from raymem.types import BankSpec


def _filled(store: ColdStore, spec: BankSpec, rows, name: str = "lab/a", count: int = 10) -> Entry:
    entry = store.catalog.create(name, spec)
    store.journal(entry).append(rows(count, 0))
    return store.catalog.get(name)


def _together(*actions: Callable[[], object]) -> list[object]:
    """Run actions at once; what each returned, or the error of ours that it raised."""
    gate, outcomes = threading.Barrier(len(actions)), dict[int, object]()

    def run(index: int, action: Callable[[], object]) -> None:
        gate.wait()
        try:
            outcomes[index] = action()
        except RaymemError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[index] for index in range(len(actions))]


@pytest.mark.parametrize("turn", range(4))
def test_a_bank_is_removed_or_forked_never_both(store: ColdStore, spec: BankSpec, rows, turn):
    _filled(store, spec, rows)
    removed, forked = _together(lambda: store.remove("lab/a"), lambda: fork_at(store, "lab/a", "lab/b", 7))
    if isinstance(forked, Entry):
        assert isinstance(removed, Conflict)
        assert sum(map(len, store.journal(forked).scan())) == 7
    else:
        assert removed is None
        assert isinstance(forked, BankNotFound)
        assert store.catalog.list() == []


def test_of_forks_of_one_name_one_is_made(store: ColdStore, spec: BankSpec, rows):
    _filled(store, spec, rows)
    made = _together(*(lambda: fork_at(store, "lab/a", "lab/b", None) for _ in range(4)))
    assert sum(isinstance(outcome, Entry) for outcome in made) == 1
    assert [entry.name for entry in store.catalog.list()] == ["lab/a", "lab/b"]


@pytest.mark.parametrize("turn", range(3))
def test_a_bank_that_is_claimed_meanwhile_is_not_taken_back(store: ColdStore, spec: BankSpec, rows, turn):
    entry = _filled(store, spec, rows)
    claimed, restored = _together(
        lambda: store.catalog.claim("lab/a", "owner", entry.epoch), lambda: restore_to(store, "lab/a", 4)
    )
    names = [found.name for found in store.catalog.list()]
    if isinstance(restored, NotOwner):
        assert isinstance(claimed, Entry)
        assert (names, claimed.id) == (["lab/a"], entry.id)
        return
    # whoever claimed has the bank that answers to the name: the new one, or the old one before it stepped back
    assert names == ["lab/a", "lab/a-before-restore"]
    assert store.journal(store.catalog.get("lab/a")).end() == 4
    assert store.journal(store.catalog.get("lab/a-before-restore")).end() == 10


def test_a_fork_reads_on_when_its_parent_was_written_anew_and_renamed(store: ColdStore, spec: BankSpec, rows):
    _filled(store, spec, rows)
    middle = fork_at(store, "lab/a", "lab/b", 8)
    fork = fork_at(store, "lab/b", "lab/c", None)
    # a fork at what its parent inherited hangs on the ancestor, and survives what happens to the parent
    assert (fork.parent, fork.base) == (store.catalog.get("lab/a").id, 8)
    journal = store.journal(fork)
    materialise_cold(store, middle)
    store.remove("lab/b")
    restore_to(store, "lab/a", 3)
    assert [pos for part in journal.scan() for pos in part.pos_T.tolist()] == list(range(8))
    assert journal.find("s", "r", 0, 99).keys() == set(range(8))
    assert len(journal.tokens("s", "r", 5, 99)) == 3


def test_a_materialised_fork_holds_its_rows_itself(store: ColdStore, spec: BankSpec, rows):
    _filled(store, spec, rows)
    fork = fork_at(store, "lab/a", "lab/b", 6)
    claimed = store.catalog.claim("lab/b", "owner", 0)
    store.journal(claimed).append(rows(5, 6))
    store.catalog.release("lab/b", claimed.epoch)
    before = [crc for part in store.journal(store.catalog.get("lab/b")).scan() for crc in part.crc_T.tolist()]
    materialise_cold(store, store.catalog.get("lab/b"))
    alone = store.catalog.get("lab/b")
    assert (alone.parent, alone.base, alone.owner, alone.state) == (None, 0, None, "cold")
    store.remove("lab/a")
    after = [crc for part in store.journal(alone).scan() for crc in part.crc_T.tolist()]
    assert after == before
    with pytest.raises(NotOwner):
        materialise_cold(store, fork)
