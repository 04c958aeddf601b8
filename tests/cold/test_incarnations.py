import threading
import time
from datetime import timedelta

import pytest

from raymem import lease as lease_module
from raymem.cold.store import ColdStore, Incarnations
from raymem.lease import Lease, Watch


@pytest.fixture
def incarnations(store: ColdStore) -> Incarnations:
    return store.incarnations


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The owner's clock and the observers', in the test's hands."""
    time = [100.0]
    monkeypatch.setattr(lease_module, "clock", lambda: time[0])
    return time


def test_a_store_where_nobody_owned_anything_has_no_incarnations(incarnations, store):
    assert incarnations.list() == []
    assert Watch(incarnations).living() == {}


def test_a_new_incarnation_of_an_owner_ends_the_one_before(incarnations):
    incarnations.register("a", "one", 9.0)
    incarnations.register("b", "two", 9.0)
    incarnations.register("c", "one", 9.0)

    assert [(seen.id, seen.owner) for seen in incarnations.list()] == [("b", "two"), ("c", "one")]
    assert not incarnations.beat("a")
    assert incarnations.beat("c")
    assert [seen.beats for seen in incarnations.list("one")] == [1]


def test_an_incarnation_is_ended_only_where_its_counter_was_last_seen(incarnations):
    incarnations.register("a", "one", 9.0)
    seen = incarnations.list()[0]
    incarnations.beat("a")

    assert not incarnations.expire(seen)
    assert incarnations.beat("a")
    assert incarnations.expire(incarnations.list()[0])
    assert not incarnations.beat("a")


def test_beats_at_once_from_many_owners_all_count(incarnations):
    for name in "abcd":
        incarnations.register(name, name, 9.0)

    def beat(name: str) -> None:
        for _ in range(10):
            assert incarnations.beat(name)

    threads = [threading.Thread(target=beat, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {seen.owner: seen.beats for seen in incarnations.list()} == dict.fromkeys("abcd", 10)


def test_a_thousand_beats_leave_few_versions_and_fragments(store, monkeypatch):
    monkeypatch.setattr("raymem.cold.incarnations._KEEP_VERSIONS", timedelta(seconds=0.1))
    incarnations = Incarnations(ColdStore.open(store.uri, "none").tables)
    incarnations.register("a", "one", 9.0)
    for _ in range(400):
        incarnations.beat("a")

    table = store.tables.open("incarnations")
    assert incarnations.list()[0].beats == 400
    assert table.version >= 400
    # those since the last clean-up, those too young for it, and those of the clean-up itself
    assert len(table.list_versions()) < 300
    assert table.stats()["fragment_stats"]["num_fragments"] < 10


def test_an_observer_waits_for_a_whole_lease_of_silence(incarnations):
    time = [0.0]
    watch = Watch(incarnations, lambda: time[0])
    incarnations.register("a", "one", 9.0)

    assert watch.living() == {"one": 0.0}
    time[0] = 8.0
    assert watch.living() == {"one": 8.0}
    incarnations.beat("a")
    time[0] = 9.5
    assert watch.living() == {"one": 0.0}
    time[0] = 18.4
    assert watch.living() == {"one": pytest.approx(8.9)}
    time[0] = 18.6
    assert watch.living() == {}
    assert not incarnations.beat("a")


def test_an_observer_that_slept_has_seen_nothing_stand_still(incarnations):
    time = [0.0]
    watch = Watch(incarnations, lambda: time[0])
    incarnations.register("a", "one", 9.0)
    watch.living()

    time[0] = 1000.0

    assert watch.living() == {"one": 0.0}


def test_a_lease_counts_from_when_its_last_beat_began_and_never_comes_back(incarnations, now):
    lease = Lease(incarnations, "one", 9.0)
    assert not lease.valid
    lease.hold()
    now[0] += 8.9
    assert lease.valid
    lease.beat()
    now[0] += 8.9
    assert lease.valid

    now[0] += 0.1
    assert not lease.valid
    lease.beat()
    assert not lease.valid
    assert incarnations.list()[0].beats == 1


def test_a_beat_that_took_longer_than_the_lease_does_not_save_it(incarnations, now, monkeypatch):
    lease = Lease(incarnations, "one", 9.0)
    lease.hold()
    beat = incarnations.beat

    def slow(id: str) -> bool:
        now[0] += 9.0
        return beat(id)

    monkeypatch.setattr(incarnations, "beat", slow)
    lease.beat()

    assert not lease.valid


def test_a_lease_that_others_ended_is_over(incarnations, now):
    lease = Lease(incarnations, "one", 9.0)
    lease.hold()
    incarnations.retire(lease.id)

    lease.beat()

    assert not lease.valid


def test_a_lease_given_up_is_over_for_everyone_at_once(incarnations):
    lease = Lease(incarnations, "one", 9.0)
    lease.hold()
    assert Watch(incarnations).living().keys() == {"one"}

    lease.release()

    assert not lease.valid
    assert Watch(incarnations).living() == {}
    lease.hold()
    assert not lease.valid


def test_a_lease_is_kept_while_it_is_held_and_runs_out_when_nobody_does(incarnations):
    lease = Lease(incarnations, "one", 0.6)
    lease.hold()
    stop = threading.Event()
    stop.wait(1.5)
    assert lease.valid

    # what a killed process leaves behind
    del lease
    watch = Watch(incarnations)
    # on a busy machine a look may come too late, and begins its count again
    until = time.monotonic() + 60
    while watch.living():
        assert time.monotonic() < until
        stop.wait(0.1)
