"""A host with less memory than its banks take: the policy alone, then real banks that leave and come back."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import raymem
from raymem import Settings, Store
from raymem.config import ColdSettings, HostSettings
from raymem.errors import TooLarge
from raymem.host.host import Host
from raymem.host.memory_budget import PAST, MemoryLimit

LIMIT = MemoryLimit("one", 70, "host.memory_bytes")
SIZES = {"a": 10, "b": 20, "c": 30}


def used(order: str) -> dict[str, int]:
    """The bytes of banks, in the order of their last use."""
    return {name: SIZES[name] for name in order}


def test_who_was_not_used_for_longest_leaves_first_and_no_more_than_have_to():
    assert LIMIT.leaving("d", 10, used("abc"), set()) == []
    assert LIMIT.leaving("d", 11, used("abc"), set()) == ["a"]
    assert LIMIT.leaving("d", 11, used("bca"), set()) == ["b"]
    assert LIMIT.leaving("d", 45, used("cab"), set()) == ["c", "a"]


async def test_who_was_never_used_leaves_before_all_others(cold, bank_spec, make_trace):
    host = Host(cold, Settings(host=HostSettings(memory_bytes=2**40)), "one")
    for name in ("x/a", "x/b", "x/c"):
        cold.catalog.create(name, bank_spec)
        await host.attach(name)
    for name in ("x/a", "x/c", "x/a"):
        await host.write(name, make_trace(1), durable=False)
    assert list(host.held()) == [PAST, "x/b", "x/c", "x/a"]
    await host.close()


def test_pinned_banks_stay():
    assert LIMIT.leaving("d", 11, used("abc"), {"a"}) == ["b"]
    with pytest.raises(
        TooLarge, match=r"bank 'd' takes 41 bytes, and one may hold 70, 30 of them in pinned banks.*host"
    ):
        LIMIT.leaving("d", 41, used("abc"), {"c"})


def test_a_bank_that_grows_does_not_make_room_for_its_own_bytes_twice():
    assert LIMIT.leaving("a", 20, used("abc"), set()) == []
    assert LIMIT.leaving("a", 21, used("abc"), set()) == ["b"]


def test_without_a_limit_nobody_leaves():
    none = LIMIT._replace(nbytes=None)
    assert none.leaving("d", 10**15, used("abc"), set()) == []
    assert not none.is_short({"a": 10**15})


@pytest.fixture
def spec(tiny):
    return tiny.spec("spalm")


def open_store(folder: Path, limit: int | None) -> Store:
    host = HostSettings(memory_bytes=limit)
    return raymem.connect(folder / "memory", settings=Settings(cold=ColdSettings(sync="none"), host=host))


@pytest.fixture
def one_bank(tmp_path: Path, tiny) -> int:
    """What a bank of 300 rows takes in memory."""
    with open_store(tmp_path / "measure", None) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("a/b", tiny.spec("spalm"))
        bank.write(tiny.trace(300))
        # until they are applied its rows take room as they came
        bank.digest()
        return bank.info().bytes


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def memory_of(store: Store) -> dict[str, int]:
    return store.stats()["shards"][0]["memory"]


def test_more_banks_than_fit_are_all_used_and_nobody_hears_of_it(tmp_path, tiny, spec, one_bank):
    with open_store(tmp_path, 3 * one_bank) as store:
        store.put_calibration(tiny.calibration)
        banks = [store.create(f"a/b-{index}", spec) for index in range(7)]
        digests = []
        for index, bank in enumerate(banks):
            bank.write(tiny.trace(300, seed=index))
            digests.append(bank.digest())
        # what a write adds is made up for after its acknowledgement
        until(lambda: memory_of(store)["bytes"] <= 3 * one_bank)
        assert memory_of(store)["evicted"] >= 4

        assert [bank.digest() for bank in banks] == digests
        assert [bank.write(tiny.trace(20, seq=300, seed=index)).rows for index, bank in enumerate(banks)] == [20] * 7
        assert {bank.info().state for bank in banks} == {"hot"}
        until(lambda: store.shards()[0].loaded <= 3)
        assert store.shards()[0].banks == 7


def test_pinned_banks_stay_in_memory_and_are_counted(tmp_path, tiny, spec, one_bank):
    with open_store(tmp_path, 3 * one_bank) as store:
        store.put_calibration(tiny.calibration)
        banks = [store.create(f"a/b-{index}", spec) for index in range(5)]
        banks[0].write(tiny.trace(300))
        assert banks[0].pin().pinned
        for bank in banks[1:]:
            bank.write(tiny.trace(300))

        until(lambda: memory_of(store)["bytes"] <= 3 * one_bank)
        assert banks[0].info().bytes == memory_of(store)["pinned_bytes"] == store.shards()[0].pinned_bytes == one_bank
        assert not banks[0].unpin().pinned
        for bank in banks[1:]:
            bank.digest()
        assert banks[0].info().bytes == 0


def test_a_bank_larger_than_all_memory_is_refused_naming_both(tmp_path, tiny, spec, one_bank):
    with open_store(tmp_path, None) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("a/b", spec)
        bank.write(tiny.trace(300))
        bank.detach()
    with open_store(tmp_path, one_bank // 2) as store:
        bank = store.bank("a/b")
        with pytest.raises(TooLarge, match=rf"takes \d+ bytes, and .* may hold {one_bank // 2}"):
            bank.attach()
        assert bank.info().state == "cold"


def test_a_bank_that_outgrows_all_memory_takes_no_more_rows_and_is_read(tmp_path, tiny, spec, one_bank):
    with open_store(tmp_path, one_bank - 1) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("a/b", spec)
        bank.write(tiny.trace(300))
        with pytest.raises(TooLarge, match=r"raise host.memory_bytes"):
            bank.write(tiny.trace(10, seq=300))
        assert bank.read(tiny.trace(3).hidden).relevance_Q.shape == (3,)


def test_a_bank_that_left_memory_is_the_next_stores_once_this_one_is_closed(tmp_path, tiny, spec, one_bank):
    with open_store(tmp_path, one_bank + one_bank // 2) as store:
        store.put_calibration(tiny.calibration)
        banks = [store.create(f"a/b-{index}", spec) for index in range(3)]
        for bank in banks:
            bank.write(tiny.trace(300))
        digest = banks[2].digest()
    with open_store(tmp_path, None) as store:
        assert {store.bank(bank.name).digest() for bank in banks} == {digest}


def test_a_bank_as_it_was_takes_room_beside_banks_and_gives_it_back(tmp_path, tiny, spec, one_bank):
    with open_store(tmp_path, int(2.6 * one_bank)) as store:
        store.put_calibration(tiny.calibration)
        old, other = (store.create(f"a/{name}", spec) for name in ("old", "other"))
        for bank in (other, old):
            bank.write(tiny.trace(300))
        old.tag("then")
        host = store._async.backend.host

        # the other one, not used for longest, makes room for what the first one was
        old.read(tiny.trace(5).hidden, 4, as_of="then")

        assert host.names() == ["a/old"]
        assert host.held()[PAST] == host.past.nbytes >= one_bank
        assert sum(host.held().values()) <= host.memory_bytes
        # and the past leaves when the other comes back after the bank itself was used
        old.read(tiny.trace(5).hidden, 4)
        other.read(tiny.trace(5).hidden, 4)
        assert host.past.nbytes == 0
        assert "a/other" in host.names()


def test_a_bank_as_it_was_that_does_not_fit_beside_the_bank_is_refused(tmp_path, tiny, spec, one_bank):
    with open_store(tmp_path, int(1.5 * one_bank)) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("a/b", spec)
        bank.write(tiny.trace(300))
        bank.tag("then")

        with pytest.raises(TooLarge, match=r"a bank as it was takes \d+ bytes.*raise host.memory_bytes"):
            bank.read(tiny.trace(5).hidden, 4, as_of="then")

        assert bank.read(tiny.trace(5).hidden, 4).relevance_Q.shape == (5,)
