"""A take-over that comes late and is cut short hides rows for a moment: nothing may make that moment last."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raymem
from raymem import Bank, Store
from raymem.cold import erasure
from raymem.cold.store import ColdStore


@pytest.fixture
def store(tmp_path: Path, tiny) -> Iterator[Store]:
    with raymem.connect(tmp_path) as opened:
        opened.put_calibration(tiny.calibration)
        yield opened


@pytest.fixture
def late(tmp_path: Path, tiny) -> Callable[[Bank], Callable[[], None]]:
    """Write 7 rows of bob's to a bank; what hides them: who looked before, stood still for long, restored and died."""

    def prepared(bank: Bank) -> Callable[[], None]:
        bank.detach()
        cold = ColdStore.open(str(tmp_path))
        table = cold.tables.open(f"journal-{cold.catalog.get(bank.name).id}")
        bank.attach()
        bank.write(tiny.trace(7, stream="bob"))
        bank.detach()
        bank.attach()
        return lambda: table.restore(table.version)

    return prepared


@pytest.fixture
def bank(store: Store, tiny) -> Bank:
    made = store.create("lab/a", tiny.spec("spalm"))
    made.write(tiny.trace(9, stream="alice"))
    return made


@pytest.mark.parametrize(("erased", "kept", "rows"), [("alice", "bob", 7), ("bob", "alice", 9)])
def test_an_erasure_takes_what_it_should_and_nothing_else(bank: Bank, late, erased: str, kept: str, rows: int):
    late(bank)()
    assert bank.erase(stream=erased).status == "complete"
    # what was hidden comes back at the next take-over at the latest
    bank.detach()
    bank.attach()
    assert bank.info().rows == rows
    assert bank.tokens(kept, "r", 0, rows).shape == (rows,)


def test_rows_that_are_hidden_while_a_journal_is_rewritten_are_not_lost(
    bank: Bank, late, monkeypatch: pytest.MonkeyPatch
):
    hide, begin = late(bank), erasure.begin

    def hidden(*args: Any) -> Any:
        monkeypatch.setattr(erasure, "begin", begin)
        hide()
        return begin(*args)

    monkeypatch.setattr(erasure, "begin", hidden)
    assert bank.erase(stream="alice").status == "complete"
    assert bank.info().rows == 7


def test_a_fork_that_stands_alone_has_all(store: Store, bank: Bank, late):
    fork = store.fork("lab/a", "lab/b")
    late(fork)()
    fork.materialise()
    store.delete("lab/a")
    assert fork.info().rows == 16
    assert fork.tokens("bob", "r", 0, 7).shape == (7,)
