import threading
import time
from datetime import timedelta

import pytest

from raymem.host import lease as lease_module
from raymem.host.lease import Lease, Watch
from raymem.storage.store import ColdStore, LeaseTable


@pytest.fixture
def lease_table(store: ColdStore) -> LeaseTable:
    return store.lease_table


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The owner's clock and the observers', in the test's hands."""
    time = [100.0]
    monkeypatch.setattr(lease_module, "clock", lambda: time[0])
    return time


def test_a_store_where_nobody_owned_anything_has_no_incarnations(lease_table, store):
    assert lease_table.list() == []
    assert Watch(lease_table).living() == {}


def test_a_new_incarnation_of_an_owner_ends_the_one_before(lease_table):
    lease_table.register("a", "one", 9.0)
    lease_table.register("b", "two", 9.0)
    lease_table.register("c", "one", 9.0)

    assert [(seen.id, seen.owner) for seen in lease_table.list()] == [("b", "two"), ("c", "one")]
    assert not lease_table.beat("a")
    assert lease_table.beat("c")
    assert [seen.beats for seen in lease_table.list("one")] == [1]


def test_an_incarnation_is_ended_only_where_its_counter_was_last_seen(lease_table):
    lease_table.register("a", "one", 9.0)
    seen = lease_table.list()[0]
    lease_table.beat("a")

    assert not lease_table.expire(seen)
    assert lease_table.beat("a")
    assert lease_table.expire(lease_table.list()[0])
    assert not lease_table.beat("a")


def test_beats_at_once_from_many_owners_all_count(lease_table):
    for name in "abcd":
        lease_table.register(name, name, 9.0)

    def beat(name: str) -> None:
        for _ in range(10):
            assert lease_table.beat(name)

    threads = [threading.Thread(target=beat, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {seen.owner: seen.beats for seen in lease_table.list()} == dict.fromkeys("abcd", 10)


def test_a_thousand_beats_leave_few_versions_and_fragments(store, monkeypatch):
    monkeypatch.setattr("raymem.storage.lease_table._KEEP_VERSIONS", timedelta(seconds=0.1))
    lease_table = LeaseTable(ColdStore.open(store.uri, "none").tables)
    lease_table.register("a", "one", 9.0)
    for _ in range(400):
        lease_table.beat("a")

    table = store.tables.open("incarnations")
    assert lease_table.list()[0].beats == 400
    assert table.version >= 400
    # those since the last clean-up, those too young for it, and those of the clean-up itself
    assert len(table.list_versions()) < 300
    assert table.stats()["fragment_stats"]["num_fragments"] < 10


def test_an_observer_waits_for_a_whole_lease_of_silence(lease_table):
    time = [0.0]
    watch = Watch(lease_table, lambda: time[0])
    lease_table.register("a", "one", 9.0)

    assert watch.living() == {"one": 0.0}
    time[0] = 8.0
    assert watch.living() == {"one": 8.0}
    lease_table.beat("a")
    time[0] = 9.5
    assert watch.living() == {"one": 0.0}
    time[0] = 18.4
    assert watch.living() == {"one": pytest.approx(8.9)}
    time[0] = 18.6
    assert watch.living() == {}
    assert not lease_table.beat("a")


def test_an_observer_that_slept_has_seen_nothing_stand_still(lease_table):
    time = [0.0]
    watch = Watch(lease_table, lambda: time[0])
    lease_table.register("a", "one", 9.0)
    watch.living()

    time[0] = 1000.0

    assert watch.living() == {"one": 0.0}


def test_a_lease_counts_from_when_its_last_beat_began_and_never_comes_back(lease_table, now):
    lease = Lease(lease_table, "one", 9.0)
    assert lease_module.clock() >= lease.deadline
    lease.hold()
    now[0] += 8.9
    assert lease_module.clock() < lease.deadline
    lease.beat()
    now[0] += 8.9
    assert lease_module.clock() < lease.deadline

    now[0] += 0.1
    assert lease_module.clock() >= lease.deadline
    lease.beat()
    assert lease_module.clock() >= lease.deadline
    assert lease_table.list()[0].beats == 1


def test_a_beat_that_took_longer_than_the_lease_does_not_save_it(lease_table, now, monkeypatch):
    lease = Lease(lease_table, "one", 9.0)
    lease.hold()
    beat = lease_table.beat

    def slow(id: str) -> bool:
        now[0] += 9.0
        return beat(id)

    monkeypatch.setattr(lease_table, "beat", slow)
    lease.beat()

    assert lease_module.clock() >= lease.deadline


def test_a_lease_that_others_ended_is_over(lease_table, now):
    lease = Lease(lease_table, "one", 9.0)
    lease.hold()
    lease_table.retire(lease.id)

    lease.beat()

    assert lease_module.clock() >= lease.deadline


def test_a_lease_given_up_is_over_for_everyone_at_once(lease_table):
    lease = Lease(lease_table, "one", 9.0)
    lease.hold()
    assert Watch(lease_table).living().keys() == {"one"}

    lease.release()

    assert lease_module.clock() >= lease.deadline
    assert Watch(lease_table).living() == {}
    lease.hold()
    assert lease_module.clock() >= lease.deadline


def test_a_lease_is_kept_while_it_is_held_and_runs_out_when_nobody_does(lease_table):
    lease = Lease(lease_table, "one", 0.6)
    lease.hold()
    stop = threading.Event()
    stop.wait(1.5)
    assert lease_module.clock() < lease.deadline

    # what a killed process leaves behind
    del lease
    watch = Watch(lease_table)
    # on a busy machine a look may come too late, and begins its count again
    until = time.monotonic() + 60
    while watch.living():
        assert time.monotonic() < until
        stop.wait(0.1)
