from collections.abc import Callable
from typing import Any

import pytest

from raymem import Ack, Trace
from raymem.bank.primary import Executor, Primary, run_now
from raymem.bank.replica import Replica, prefetch
from raymem.errors import NonFinite, NotOwner, RaymemError, StorageError
from raymem.rows import JournalRows
from raymem.storage.store import ColdStore


@pytest.fixture(params=["spalm", "titans"])
def primary(request: pytest.FixtureRequest, cold: ColdStore, tiny: Any) -> Primary:
    cold.catalog.create("lab/a", tiny.spec(request.param))
    return Primary.open(cold, cold.catalog.claim("lab/a", "me", 0))


def write(primary: Primary, traces: list[Trace]) -> list[Ack | RaymemError]:
    return run_now(primary.write(traces, Executor()))


def acks(outcomes: list[Ack | RaymemError]) -> list[Ack]:
    assert all(isinstance(outcome, Ack) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Ack)]


def test_a_group_is_one_commit_and_a_refused_trace_does_not_keep_the_others_back(primary: Primary, make_trace):
    bad = make_trace(3, run="bad")
    bad.hidden[1] = float("inf")
    first, refused, again, other = write(primary, [make_trace(5), bad, make_trace(8), make_trace(4, run="other")])
    assert isinstance(refused, NonFinite)
    assert [(ack.rows, ack.duplicates, ack.end) for ack in acks([first, again, other])] == [
        (5, 0, 5),
        (3, 5, 8),
        (4, 0, 12),
    ]
    assert primary.counters.commits == 1


def test_replaying_the_journal_alone_gives_the_same_bytes(cold: ColdStore, primary: Primary, make_trace):
    for seq in range(0, 200, 9):
        write(primary, [make_trace(9, seq=seq), make_trace(4, run=f"r{seq}", seed=seq)])
    replica = Replica(cold, primary.entry)
    replica.catch_up()
    assert replica.digest() == primary.digest()


def test_a_snapshot_and_the_tail_give_the_same_bytes(cold: ColdStore, primary: Primary, make_trace):
    write(primary, [make_trace(50)])
    primary.snapshot()
    write(primary, [make_trace(13, seq=50)])
    replica = Replica(cold, primary.entry)
    replica.recover()
    assert (replica.snapshot_pos, replica.pos) == (50, 63)
    assert replica.digest() == primary.digest()


def test_a_follower_catches_up_with_its_owner(cold: ColdStore, primary: Primary, make_trace):
    follower = Replica(cold, primary.entry)
    follower.recover()
    write(primary, [make_trace(20)])
    assert follower.catch_up() == 20
    assert follower.catch_up() == 0
    assert follower.digest() == primary.digest()


@pytest.mark.parametrize("committed", [False, True], ids=["before the commit", "after the commit"])
def test_a_failed_append_acknowledges_nothing_and_loses_nothing(
    primary: Primary, make_trace, monkeypatch: pytest.MonkeyPatch, committed: bool
):
    write(primary, [make_trace(5)])
    append: Callable[..., None] = primary.journal.append

    def failing(rows: JournalRows) -> None:
        if committed:
            append(rows)
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(primary.journal, "append", failing)
        outcome = write(primary, [make_trace(5, seq=5)])[0]
    assert isinstance(outcome, StorageError)
    # the sender tries again, as the error says
    again = acks(write(primary, [make_trace(5, seq=5)]))[0]
    assert (again.rows, again.duplicates, again.end) == ((0, 5, 10) if committed else (5, 0, 10))
    assert primary.end == primary.journal.end() == 10


def test_a_later_owner_stops_the_earlier_one(cold: ColdStore, primary: Primary, make_trace):
    write(primary, [make_trace(5)])
    later = Primary.open(cold, cold.catalog.claim("lab/a", "you", primary.entry.epoch))
    assert isinstance(write(primary, [make_trace(2, seq=5)])[0], NotOwner)
    assert isinstance(write(primary, [make_trace(2, seq=5)])[0], NotOwner)
    assert acks(write(later, [make_trace(2, seq=5)]))[0].end == 7


def test_cutting_a_trace_changes_nothing(cold: ColdStore, primary: Primary, make_trace):
    for seq in range(61):
        write(primary, [make_trace(1, seq=seq)])
    fingerprint = primary.spec.fingerprint
    assert fingerprint.calibration
    cold.catalog.create("lab/whole", primary.spec)
    whole = Primary.open(cold, cold.catalog.claim("lab/whole", "me", 0))
    write(whole, [make_trace(61)])
    assert whole.digest() == primary.digest()


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(prefetch(range(50))) == list(range(50))
    assert list(prefetch([])) == []

    def breaks():
        yield 1
        raise ValueError("torn")

    ahead = prefetch(breaks())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="torn"):
        next(ahead)
