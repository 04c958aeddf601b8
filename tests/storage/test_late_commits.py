"""A commit to a log that fails, and lands after its writer looked for it, as on an object store it may."""

from collections.abc import Callable
from typing import Any

import pytest
from lancedb.table import LanceTable

from raymem.errors import NotOwner, StorageError
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.log import Log, to_log
from raymem.storage.store import ColdStore
from raymem.storage.tables.single_writer_table import SingleWriterTable, WriterState
from raymem.storage.tables.tables import log_table

AT = 2


@pytest.fixture
def log(store: ColdStore) -> Log:
    made = Log(store.tables, "first")
    made.create()
    return made


@pytest.fixture
def journal(log: Log, owned: Callable[..., Journal], rows) -> Journal:
    """That of a bank with two rows in the log."""
    taken = owned(log)
    log.commit([(taken.entry, rows(AT, 0))])
    return taken


@pytest.fixture
def land(store: ColdStore, journal: Journal, rows) -> Callable[[int, str, int], None]:
    """Have a commit with rows of some run at the log's end land, once or twice, past its writer."""

    def commit(lsn: int, run: str, count: int, times: int = 1) -> None:
        for _ in range(times):
            store.tables.open(log_table("first")).add(to_log(lsn, [(journal.entry, rows(count, AT, run=run))]))

    return commit


@pytest.fixture
def next_owner(store: ColdStore, owned: Callable[..., Journal]) -> Callable[[], list[tuple[int, str]]]:
    """Take the bank over; return the position and run of each row."""

    def take_over() -> list[tuple[int, str]]:
        second = Log(store.tables, "second")
        second.create()
        taken = owned(second)
        return [each for part in taken.scan() for each in zip(part.pos_T.tolist(), part.runs, strict=True)]

    return take_over


def expected(late: int) -> list[tuple[int, str]]:
    return [(pos, "r") for pos in range(AT)] + [(AT + pos, "late") for pos in range(late)]


@pytest.mark.parametrize("late", [1, 3, 6])
@pytest.mark.parametrize("times", [1, 2])
def test_whose_positions_it_has_taken_counts_for_nothing(land, next_owner, late: int, times: int):
    land(2, "late", late, times)
    land(3, "next", 4)
    assert next_owner() == expected(late)


@pytest.mark.parametrize("then", ["lands", "fails", "lands, and looks like a failure"])
def test_it_ends_the_log_whatever_became_of_the_next(
    log: Log, journal: Journal, rows, land, next_owner, monkeypatch: pytest.MonkeyPatch, then: str
):
    def write(run: str, count: int) -> None:
        log.commit([(journal.entry, rows(count, AT, run=run))])

    def no_answer(*_: Any) -> None:
        raise OSError(110, "Connection timed out", "storage")

    said: dict[str, tuple[type[Exception], list[tuple[type, str]]]] = {
        "lands": (NotOwner, []),
        "fails": (StorageError, [(LanceTable, "add")]),
        "lands, and looks like a failure": (OSError, [(SingleWriterTable, "_alone")]),
    }
    error, failing = said[then]
    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, "add", no_answer)
        with pytest.raises(StorageError):
            write("late", 3)
    assert journal.counted() == AT
    land(2, "late", 3)
    with monkeypatch.context() as patch:
        for owner, step in failing:
            patch.setattr(owner, step, no_answer)
        with pytest.raises(error):
            write("next", 4)
    with pytest.raises(NotOwner):
        journal.counted()
    assert log.state is WriterState.LOST
    assert next_owner() == expected(3)
