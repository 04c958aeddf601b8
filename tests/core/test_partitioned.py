"""Partitions of a bank in one process: what is read, where streams live, and moving them."""

import dataclasses
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import raymem
from raymem import BankSpec, Store, Trace
from raymem.config import ColdSettings, Settings
from raymem.errors import (
    BankDetached,
    BankExists,
    BankNotFound,
    Conflict,
    InvalidInput,
    InvalidName,
    Reassigned,
    TagNotFound,
    Unsupported,
)
from raymem.memory import kinds
from raymem.partition.rebalance import plan
from raymem.storage.partitions import Place
from raymem.storage.store import ColdStore

FAST = Settings(cold=ColdSettings(sync="none"))


@pytest.fixture
def settings() -> Settings:
    return FAST


def backend(store: Store):
    return store._async.backend


def valued(tiny, rows: int, stream: str, seed: int, run: str = "r", seq: int = 0) -> Trace:
    """A trace whose rows carry vectors too."""
    trace = tiny.trace(rows, stream=stream, run=run, seq=seq, seed=seed)
    return dataclasses.replace(trace, values=trace.hidden[:, 0].float() * 2, time=float(seed + 1))


def valued_spec(tiny) -> BankSpec:
    spec = tiny.spec()
    return spec.model_copy(update={"fingerprint": spec.fingerprint.model_copy(update={"values": "embedding"})})


def filled(store: Store, tiny, partitions: int = 3, streams: int = 6):
    bank = store.create("lab/many", tiny.spec(), partitions=partitions)
    for number in range(streams):
        bank.write(tiny.trace(17 + number, stream=f"s{number}", seed=number))
    return bank


def held(store: Store, name: str = "lab/many") -> Counter:
    """How often each row is in the journals of all partitions."""
    cold, found = backend(store).cold, Counter()
    for part in store.bank(name).info().partitions:
        for rows in cold.journal(cold.catalog.get(part.name)).scan():
            found.update(zip(rows.streams, rows.runs, rows.seq_T.tolist(), strict=True))
    return found


def names(readout, query: int) -> list[tuple[str, str, int]]:
    return [(row.stream, row.run, row.seq) for row in readout.rows(query)]


@pytest.mark.parametrize(("partitions", "streams", "k", "window"), [(2, 1, 3, 1), (3, 7, 9, 1), (5, 11, 31, 5)])
def test_a_read_is_that_of_one_bank_with_the_same_rows(store, tiny, partitions, streams, k, window):
    spec = valued_spec(tiny)
    if window > 1:
        spec = spec.model_copy(update={"key": spec.key.model_copy(update={"function": "window", "window": window})})
    whole, many = store.create("lab/whole", spec), store.create("lab/many", spec, partitions=partitions)
    for number in range(streams):
        for run, cut in (("a", 13 + number), ("b", 1 + 2 * number)):
            trace = valued(tiny, cut, f"s{number}", 31 * number + len(run) + cut, run)
            assert whole.write(trace).rows == many.write(trace).rows == cut

    for queries in (tiny.trace(6, seed=40).hidden, tiny.trace(5, seed=15).hidden, tiny.trace(0).hidden):
        expected, got = whole.read(queries, k), many.read(queries, k)

        # a row's score doesn't depend on the rows beside it, so all of it is equal to the bit
        assert torch.equal(got.scores_Qk, expected.scores_Qk)
        assert torch.equal(got.tokens_Qk, expected.tokens_Qk)
        assert torch.equal(got.relevance_Q, expected.relevance_Q)
        assert torch.equal(got.values_QV, expected.values_QV)
        assert expected.values_QV.shape[1] == tiny.width
        assert [names(got, q) for q in range(len(queries))] == [names(expected, q) for q in range(len(queries))]
        assert {row.partition for q in range(len(queries)) for row in got.rows(q)} <= set(range(partitions))
        assert not got.partial


def test_an_empty_bank_reads_nothing(store, tiny):
    readout = store.create("lab/many", tiny.spec(), partitions=3).read(tiny.trace(2).hidden, 4)

    assert readout.relevance_Q.tolist() == [0, 0]
    assert readout.rows(0) == []
    assert readout.tokens_Qk.tolist() == [[-1] * 4] * 2
    assert readout.partition_Qk.tolist() == [[-1] * 4] * 2


def test_ties_go_by_position_and_then_by_partition(store, tiny):
    bank = store.create("lab/many", tiny.spec(), partitions=3)
    same = tiny.trace(9, seed=3)
    for stream in ("a", "b", "c"):
        bank.write(dataclasses.replace(same, stream=stream))

    found = bank.read(same.hidden[4:5], 5, start=4).rows(0)

    assert [(row.pos, row.partition) for row in found[:3]] == [(4, 0), (4, 1), (4, 2)]


def test_streams_are_spread_and_stay_where_they_are(store, tiny):
    bank = filled(store, tiny, partitions=3, streams=6)
    before = [part.rows for part in bank.info().partitions]
    assert min(before) > 0

    assert len(bank.grow(5).partitions) == 5
    for number in range(6):
        assert bank.write(tiny.trace(30, stream=f"s{number}", seed=number)).duplicates == 17 + number
    assert [part.rows for part in bank.info().partitions[3:]] == [0, 0]
    bank.write(tiny.trace(9, stream="new", seed=77))

    assert [part.rows for part in bank.info().partitions[3:]] == [9, 0]
    assert names(bank.read(tiny.trace(9, seed=77).hidden[5:6], 1, start=5), 0) == [("new", "r", 5)]
    with pytest.raises(InvalidInput, match="5 partitions"):
        bank.grow(4)


def test_more_than_ten_partitions_are_listed_in_their_order(store, tiny):
    bank = store.create("lab/many", tiny.spec(), partitions=12)

    assert store.banks() == [bank.info()]


def test_two_who_ask_at_once_agree_where_a_stream_lives(tmp_path, tiny):
    uri = str(tmp_path / "store")
    layout = ColdStore.open(uri, "none").partitions.create("lab/many", tiny.spec(), 3)
    clients = [ColdStore.open(uri, "none").partitions for _ in range(2)]
    start = threading.Barrier(2)

    def ask(client) -> dict[str, int]:
        start.wait()
        found = {}
        for number in range(12):
            found |= client.assign(layout, [f"s{number}", f"s{number + 1}"])
        return {stream: place.home for stream, place in found.items()}

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, clients)

    assert first == second
    assert sorted(Counter(first.values()).values()) == [4, 4, 5]


def test_a_partition_takes_no_row_of_a_stream_that_lives_elsewhere(store, tiny):
    bank = store.create("lab/many", tiny.spec(), partitions=2)
    bank.write(tiny.trace(5))
    host = backend(store).host

    with pytest.raises(Reassigned, match=r"lab/many\.p1"):
        store._loop.run(host.write("lab/many.p1", tiny.trace(9)))
    with pytest.raises(Reassigned):
        store._loop.run(host.write("lab/many.p0", tiny.trace(9, stream="never heard of")))
    assert bank.info().rows == 5


def test_partitions_are_nobodys_to_name(store, tiny):
    bank = filled(store, tiny)

    assert [info.name for info in store.banks()] == ["lab/many"]
    assert store.banks("lab/many.p1") == []
    with pytest.raises(InvalidName):
        store.bank("lab/many.p0")
    with pytest.raises(BankExists):
        store.create("lab/many", tiny.spec())
    with pytest.raises(BankNotFound) as refused:
        store.bank("lab/manx").info()
    assert ".p" not in refused.value.message
    assert bank.info().rows == sum(part.rows for part in bank.info().partitions) == 117


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind != "spalm"])
def test_a_kind_with_one_state_is_refused(store, tiny, kind):
    with pytest.raises(Unsupported, match="one bounded state"):
        store.create("lab/many", tiny.spec(kind), partitions=2)
    assert store.banks() == []


def test_one_partition_is_an_ordinary_bank(store, tiny):
    bank = store.create("lab/one", tiny.spec(), partitions=1)
    bank.write(tiny.trace(9))

    assert bank.info().partitions == ()
    assert bank.read(tiny.trace(2).hidden, 2).partition_Qk is None
    for refused in (lambda: bank.grow(2), bank.rebalance):
        with pytest.raises(Unsupported, match="not partitioned"):
            refused()
    with pytest.raises(InvalidInput, match="no partition 1"):
        bank.migrate("local", partition=1)
    with pytest.raises(InvalidInput, match="1 to 256"):
        store.create("lab/none", tiny.spec(), partitions=0)


def test_it_sleeps_and_wakes_in_another_process(tmp_path, tiny):
    queries = tiny.trace(4, seed=5).hidden
    with raymem.connect(tmp_path, settings=FAST) as store:
        store.put_calibration(tiny.calibration)
        bank = filled(store, tiny)
        before, digest = bank.read(queries, 7), bank.digest()
        assert bank.detach().state == "cold"
        for refused in (lambda: bank.read(queries), lambda: bank.write(tiny.trace(3)), bank.detach, bank.digest):
            with pytest.raises(BankDetached, match="'lab/many'"):
                refused()
    with raymem.connect(tmp_path, settings=FAST) as store:
        bank = store.bank("lab/many")
        assert bank.attach().state == "hot"
        assert torch.equal(bank.read(queries, 7).scores_Qk, before.scores_Qk)
        assert bank.digest() == digest
        assert bank.write(tiny.trace(17, stream="s0", seed=0)).duplicates == 17


def test_tags_and_times_read_what_it_was(store, tiny):
    bank = filled(store, tiny)
    queries = tiny.trace(4, seed=5).hidden
    before = bank.read(queries, 7)
    assert bank.tag("then") == {"then": 117} == bank.tags()
    bank.grow(4)
    bank.write(dataclasses.replace(tiny.trace(30, stream="late", seed=5), time=9.0))

    assert bank.tags() == {"then": 117}
    for as_of in ("then", 5.0):
        was = bank.read(queries, 7, as_of=as_of)
        assert [names(was, q) for q in range(4)] == [names(before, q) for q in range(4)]
    assert names(bank.read(queries, 7), 2) != names(before, 2)
    for nothing in ("never", "nan"):
        with pytest.raises(TagNotFound, match=f"bank lab/many has no tag '{nothing}'"):
            bank.read(queries, 7, as_of=nothing)
    with pytest.raises(Conflict, match="then"):
        bank.rebalance()
    assert bank.untag("then") == {}
    with pytest.raises(TagNotFound):
        bank.untag("then")


def test_a_time_before_streams_moved_is_refused(store, tiny):
    bank = filled(store, tiny, partitions=2)
    bank.grow(4)
    assert bank.rebalance().streams > 0

    with pytest.raises(InvalidInput, match="moved between its partitions"):
        bank.read(tiny.trace(2).hidden, 2, as_of=5.0)


def test_an_export_is_one_bank_with_all_rows(store, tiny, tmp_path):
    bank = filled(store, tiny)
    queries = tiny.trace(4, seed=2).hidden

    assert bank.export(tmp_path / "many") == (tmp_path / "many").stat().st_size
    copy = store.import_(tmp_path / "many", "lab/copy")
    copy.attach()

    assert copy.info().rows == 117
    assert torch.equal(copy.read(queries, 9).scores_Qk, bank.read(queries, 9).scores_Qk)
    assert copy.tokens("s1", "r", 3, 9).tolist() == bank.tokens("s1", "r", 3, 9).tolist() != []


def test_erasing_takes_a_stream_from_wherever_it_is(store, tiny):
    bank = filled(store, tiny)

    receipt = bank.erase(stream="s2")

    assert (receipt.bank, receipt.rows, receipt.status, receipt.proves) == ("lab/many", 19, "complete", True)
    assert [each.rows for each in bank.receipts()] == [19]
    assert not any(stream == "s2" for stream, _, _ in held(store))
    assert bank.erase(stream="nobody").rows == 0
    assert bank.erase(before=2.0).rows == 117 - 19
    assert bank.info().rows == 0
    store.delete("lab/many")
    assert sum(each.rows for each in bank.receipts()) == 117


def test_removing_it_leaves_nothing(store, tiny):
    bank = filled(store, tiny)
    cold = backend(store).cold
    store.delete("lab/many")

    assert cold.catalog.list() == []
    assert cold.partitions._table.rows() == []
    with pytest.raises(BankNotFound):
        bank.info()
    # a client that knew the bank of that name writes to the new one
    again = store.create("lab/many", tiny.spec(), partitions=2)
    assert bank.write(tiny.trace(4, stream="s1")).rows == 4
    assert again.info().rows == 4


@pytest.mark.parametrize(
    ("held", "moves"),
    [
        ([{"a": 5}, {}], 0),
        ([{"a": 5, "b": 5}, {}], 1),
        ([{"a": 50}, {"b": 20, "c": 20}, {}], 1),
        ([{"a": 10}, {"b": 10}, {"c": 11}], 0),
        ([{}, {}], 0),
    ],
)
def test_a_plan_moves_as_little_as_helps(held, moves):
    assert len(plan(held)) == moves


def test_a_plan_evens_the_rows_out():
    held = [{f"s{number}": 10 + number % 7 for number in range(40)}, {}, {}]
    loads = [sum(held[0].values()), 0, 0]
    for stream, target in plan(held):
        loads[0] -= held[0][stream]
        loads[target] += held[0][stream]

    assert max(loads) <= 1.1 * sum(loads) / 3


def test_rebalancing_moves_whole_streams_and_keeps_every_row(store, tiny):
    bank = filled(store, tiny, partitions=1 + 1, streams=8)
    bank.write(tiny.trace(30, stream="s1", run="other", seed=50))
    queries = tiny.trace(5, seed=50).hidden
    before, rows = bank.read(queries, 9), held(store)
    bank.grow(4)

    report = bank.rebalance()

    assert report.streams > 1
    assert report.rows == sum(part.rows for part in bank.info().partitions[2:])
    assert report.failed == {}
    assert held(store) == rows
    after = bank.read(queries, 9)
    assert torch.equal(after.scores_Qk, before.scores_Qk)
    for number in range(8):
        assert bank.write(tiny.trace(30, stream=f"s{number}", seed=number)).duplicates == 17 + number
    assert bank.rebalance().streams == 0


class Stop(Exception):
    """The end of a process: nothing that raymem catches."""


STEPS = ("change 1", "pull 1", "change 2", "release 1", "pull 2", "change 3", "erase_part 1", "change 4")


@pytest.mark.parametrize("step", STEPS)
def test_a_move_cut_short_before_any_step_keeps_every_row_once_and_is_finished_by_the_next(
    store, tiny, monkeypatch, step
):
    bank = filled(store, tiny, partitions=2, streams=3)
    bank.grow(3)
    queries, rows = tiny.trace(5, seed=1).hidden, held(store)
    before = bank.read(queries, 9)
    verb, count = step.split()
    at = backend(store).cold.partitions if verb == "change" else backend(store)
    asked = verb in ("pull", "release")
    done, calls = getattr(at, "ask" if asked else verb), []

    def stopped(*args):
        if not asked or args[1] == verb:
            calls.append(args)
            if len(calls) == int(count):
                raise Stop
        return done(*args)

    with monkeypatch.context() as patch:
        patch.setattr(at, "ask" if asked else verb, stopped)
        with pytest.raises(Stop):
            bank.rebalance()

    # no row is read twice or missed, whatever the journals hold
    assert set(held(store)) == set(rows)
    between = bank.read(queries, 9)
    assert [names(between, q) for q in range(5)] == [names(before, q) for q in range(5)]
    assert bank.rebalance().failed == {}
    assert held(store) == rows
    assert [part.rows for part in bank.info().partitions] == [19, 18, 17]
    assert names(bank.read(queries, 9), 3) == names(before, 3)


def test_a_stream_is_written_and_read_while_it_moves(store, tiny):
    bank = store.create("lab/many", tiny.spec(), partitions=2)
    for stream in ("a", "b", "c", "d"):
        bank.write(tiny.trace(40, stream=stream, seed=ord(stream)))
    bank.grow(4)
    query, over, seen = tiny.trace(20, seed=ord("c")).hidden[9:10], threading.Event(), []

    def write() -> int:
        seq = 40
        while not over.is_set():
            for stream in ("a", "b", "c", "d"):
                assert bank.write(tiny.trace(1, stream=stream, seq=seq, seed=ord(stream))).rows == 1
            seq += 1
        return seq

    def read() -> None:
        while not over.is_set():
            seen.append(names(bank.read(query, 2, start=9), 0)[0])

    with ThreadPoolExecutor(2) as pool:
        writing, reading = pool.submit(write), pool.submit(read)
        try:
            report = bank.rebalance()
        finally:
            over.set()
        end, _ = writing.result(), reading.result()

    assert (report.streams, report.failed) == (2, {})
    assert set(seen) == {("c", "r", 9)}
    assert held(store) == Counter({(stream, "r", seq): 1 for stream in "abcd" for seq in range(end)})


def test_a_mover_that_died_holds_nobody_for_long(store, tiny, monkeypatch):
    monkeypatch.setattr("raymem.partition.backend._HOLD_S", 0.2)
    bank = filled(store, tiny, partitions=2, streams=2)
    partitions = backend(store).cold.partitions
    layout = partitions.get("lab/many")
    store._loop.run(backend(store).ask("lab/many.p0", "release", "s0"))
    partitions.change(layout, "s0", Place(0), Place(0, target=1, held=True))

    assert bank.write(tiny.trace(30, stream="s0", seed=0)).rows == 13
    assert partitions.find(layout.id, "s0") == Place(0, stale=1)


def test_rows_erased_while_their_stream_moves_do_not_come_back(store, tiny):
    bank = filled(store, tiny, partitions=2, streams=2)
    inner, partitions = backend(store), backend(store).cold.partitions
    layout = partitions.get("lab/many")
    partitions.change(layout, "s0", Place(0), Place(0, target=1))
    assert store._loop.run(inner.ask("lab/many.p1", "pull", "lab/many.p0", "s0", 0)) == (17, 17)

    assert bank.erase(stream="s0", run="none").rows == 0

    with pytest.raises(Reassigned):
        store._loop.run(inner.ask("lab/many.p1", "pull", "lab/many.p0", "s0", 0))
    with pytest.raises(Conflict):
        partitions.change(layout, "s0", Place(0, target=1), Place(1, stale=0))
    assert bank.erase(stream="s0").rows == 34
    assert not any(stream == "s0" for stream, _, _ in held(store))
