from collections.abc import Callable
from typing import Any

import pytest

from raymem import Ack
from raymem.bank.prefetch import prefetch
from raymem.bank.replica import Replica, Runtime
from raymem.errors import NonFinite, NotOwner, RaymemError, StorageError
from raymem.rows import JournalRows
from raymem.storage.store import ColdStore


@pytest.fixture(params=["spalm", "titans"])
def runtime(request: pytest.FixtureRequest, cold: ColdStore, tiny: Any) -> Runtime:
    cold.catalog.create("lab/a", tiny.spec(request.param))
    return Runtime.open(cold, cold.catalog.claim("lab/a", "me", 0))


def acks(outcomes: list[Ack | RaymemError]) -> list[Ack]:
    assert all(isinstance(outcome, Ack) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Ack)]


def test_a_group_is_one_commit_and_a_refused_trace_does_not_keep_the_others_back(runtime: Runtime, make_trace):
    bad = make_trace(3, run="bad")
    bad.hidden[1] = float("inf")
    first, refused, again, other = runtime.write([make_trace(5), bad, make_trace(8), make_trace(4, run="other")])
    assert isinstance(refused, NonFinite)
    assert [(ack.rows, ack.duplicates, ack.end) for ack in acks([first, again, other])] == [
        (5, 0, 5),
        (3, 5, 8),
        (4, 0, 12),
    ]
    assert runtime.counters.commits == 1


def test_replaying_the_journal_alone_gives_the_same_bytes(cold: ColdStore, runtime: Runtime, make_trace):
    for seq in range(0, 200, 9):
        runtime.write([make_trace(9, seq=seq), make_trace(4, run=f"r{seq}", seed=seq)])
    replica = Replica(cold, runtime.entry)
    replica.catch_up()
    assert replica.digest() == runtime.digest()


def test_a_snapshot_and_the_tail_give_the_same_bytes(cold: ColdStore, runtime: Runtime, make_trace):
    runtime.write([make_trace(50)])
    runtime.snapshot()
    runtime.write([make_trace(13, seq=50)])
    replica = Replica(cold, runtime.entry)
    replica.recover()
    assert (replica.snapshot_pos, replica.pos) == (50, 63)
    assert replica.digest() == runtime.digest()


def test_a_follower_catches_up_with_its_owner(cold: ColdStore, runtime: Runtime, make_trace):
    follower = Replica(cold, runtime.entry)
    follower.recover()
    runtime.write([make_trace(20)])
    assert follower.catch_up() == 20
    assert follower.catch_up() == 0
    assert follower.digest() == runtime.digest()


@pytest.mark.parametrize("committed", [False, True], ids=["before the commit", "after the commit"])
def test_a_failed_append_acknowledges_nothing_and_loses_nothing(
    runtime: Runtime, make_trace, monkeypatch: pytest.MonkeyPatch, committed: bool
):
    runtime.write([make_trace(5)])
    append: Callable[..., None] = runtime.journal.append

    def failing(rows: JournalRows) -> None:
        if committed:
            append(rows)
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(runtime.journal, "append", failing)
        outcome = runtime.write([make_trace(5, seq=5)])[0]
    assert isinstance(outcome, StorageError)
    # the sender tries again, as the error says
    again = acks(runtime.write([make_trace(5, seq=5)]))[0]
    assert (again.rows, again.duplicates, again.end) == ((0, 5, 10) if committed else (5, 0, 10))
    assert runtime.pos == runtime.journal.end() == 10


def test_a_later_owner_stops_the_earlier_one(cold: ColdStore, runtime: Runtime, make_trace):
    runtime.write([make_trace(5)])
    later = Runtime.open(cold, cold.catalog.claim("lab/a", "you", runtime.entry.epoch))
    assert isinstance(runtime.write([make_trace(2, seq=5)])[0], NotOwner)
    assert isinstance(runtime.write([make_trace(2, seq=5)])[0], NotOwner)
    assert acks(later.write([make_trace(2, seq=5)]))[0].end == 7


def test_cutting_a_trace_changes_nothing(cold: ColdStore, runtime: Runtime, make_trace):
    for seq in range(61):
        runtime.write([make_trace(1, seq=seq)])
    fingerprint = runtime.spec.fingerprint
    assert fingerprint.calibration
    cold.catalog.create("lab/whole", runtime.spec)
    whole = Runtime.open(cold, cold.catalog.claim("lab/whole", "me", 0))
    whole.write([make_trace(61)])
    assert whole.digest() == runtime.digest()


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
