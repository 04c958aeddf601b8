"""Real raylets, real processes, real kills. The last tests take a node away."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import torch

import raymem
from raymem import AsyncStore, AttendedRows, Settings, Store
from raymem.actors import backend as backend_module
from raymem.actors import cluster
from raymem.actors.calls import NAMESPACE, Remote, ask_all
from raymem.actors.cluster import LocalNodes
from raymem.bank.primary import Executor, Primary, run_now
from raymem.config import ColdSettings, HostSettings
from raymem.errors import (
    BackendUnavailable,
    BankDetached,
    BankNotFound,
    ConfigError,
    Conflict,
    InvalidInput,
    InvalidTrace,
    NotShared,
    Overloaded,
    SequenceConflict,
)
from raymem.host.host import caller
from raymem.storage.partitions import Place
from raymem.storage.store import ColdStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
# a commit that waits for the disk is the cold room's to test
SETTINGS = Settings(cold=ColdSettings(sync="none"), host=HostSettings(lease_s=2.0))
names = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray") / "memory"


@pytest.fixture(scope="module")
def store(nodes: LocalNodes, folder: Path, tiny) -> Iterator[Store]:
    with raymem.connect("ray", cold=str(folder), settings=SETTINGS) as opened:
        opened.put_calibration(tiny.calibration)
        yield opened


@pytest.fixture
def bank(store: Store, tiny):
    bank = store.create(f"ray/bank-{next(names)}", tiny.spec("spalm"))
    bank.write(tiny.trace(50))
    return bank


def pid_of(store: Store, owner: str) -> int:
    return next(shard["pid"] for shard in store.stats()["shards"] if shard["owner"] == owner)


def split_bank(store: Store, tiny) -> raymem.Bank:
    """A bank in two partitions, on a node each: a shard that an earlier test struck may not answer yet."""
    deadline = time.monotonic() + 60
    while sum("pid" in shard for shard in store.stats()["shards"]) < 2:
        assert time.monotonic() < deadline, store.stats()
        time.sleep(0.1)
    bank = store.create(f"ray/parts-{next(names)}", tiny.spec("spalm"), partitions=2)
    assert len({part.node for part in bank.info().partitions}) == 2
    return bank


def other_node(store: Store, bank: raymem.Bank) -> str:
    return next(node for node in store.nodes() if node != bank.info().node)


class Writers:
    """Threads that write runs of their own, five rows at a time, and remember what was acknowledged.

    With `apart` each run is in a stream of its own.
    """

    def __init__(self, bank: raymem.Bank, tiny, count: int, *, apart: bool = False) -> None:
        self.bank = bank
        self.tiny = tiny
        self._apart = apart
        self.acknowledged: set[tuple[str, int]] = {("r", seq) for seq in range(50)}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._done = [self._pool.submit(self._write, f"run-{index}", index) for index in range(count)]

    def _write(self, run: str, seed: int) -> None:
        for seq in range(0, 4000, 5):
            if self._stop.is_set():
                return
            stream = run if self._apart else "s"
            ack = self.bank.write(self.tiny.trace(5, stream=stream, run=run, seq=seq, seed=seed))
            assert ack.rows + ack.duplicates == 5
            self.acknowledged |= {(run, seq + row) for row in range(5)}

    def stop(self) -> None:
        self._stop.set()
        for done in self._done:
            done.result()
        self._pool.shutdown()


def journal_of(folder: Path, name: str) -> list[tuple[str, int]]:
    cold = ColdStore.open(str(folder), "none")
    parts = cold.journal(cold.catalog.get(name)).scan()
    return [row for part in parts for row in zip(part.runs, part.seq_T.tolist(), strict=True)]


def undisturbed_digest(journal: list[tuple[str, int]], folder: Path, tiny, kind: str = "spalm") -> str:
    """The digest of a bank in one process that got the same rows in the same order."""
    cold = ColdStore.open(str(folder), "none")
    calibration = tiny.calibration
    cold.calibrations.put(calibration.hash, calibration.model, calibration.layers, calibration.to_bytes())
    cold.catalog.create("a/b", tiny.spec(kind))
    primary = Primary.open(cold, cold.catalog.claim("a/b", "here", 0))
    seeds = {f"run-{index}": index for index in range(9)} | {"r": 0}
    traces = [tiny.trace(1, run=run, seq=seq, seed=seeds[run]) for run, seq in journal]
    run_now(primary.write(traces, Executor()))
    return primary.digest()


# the other kinds move between shards in test_shard.py, and sleep and wake on Ray in test_congruence.py
@pytest.mark.parametrize("kind", ["spalm", "titans"])
def test_a_bank_lives_moves_sleeps_and_wakes(store, tiny, kind):
    bank = store.create(f"ray/life-{kind}", tiny.spec(kind))
    ack = bank.write(tiny.trace(100))
    assert (ack.rows, ack.end, ack.durable) == (100, 100, True)
    assert bank.write(tiny.trace(100)).duplicates == 100
    digest, before = bank.digest(), bank.read(tiny.trace(5).hidden, 4)

    source, target = bank.info().node, other_node(store, bank)
    report = bank.migrate(target)
    assert (report.source, report.target, report.rows) == (source, target, 100)
    assert bank.info().node == target
    assert bank.digest() == digest
    assert bank.migrate(target).total_ms == 0

    assert bank.detach().state == "cold"
    with pytest.raises(BankDetached, match="attach it first"):
        bank.read(tiny.trace(1).hidden)
    info = bank.attach(source)
    assert (info.state, info.node, info.rows) == ("hot", source, 100)
    assert bank.digest() == digest
    after = bank.read(tiny.trace(5).hidden, 4)
    assert torch.equal(after.relevance_Q, before.relevance_Q)
    assert torch.equal(after.tokens_Qk, before.tokens_Qk)


def test_banks_spread_over_the_nodes(store, tiny):
    made = [store.create(f"ray/spread-{index}", tiny.spec("titans")) for index in range(4)]

    assert {bank.info().node for bank in made} == set(store.nodes()) == {"node-1", "node-2"}


def test_errors_arrive_as_themselves(store, bank, tiny):
    trace = tiny.trace(3)
    with pytest.raises(InvalidTrace) as wrong:
        bank.write(raymem.Trace(trace.hidden[:, :1], trace.tokens, "s", "r"))
    assert type(wrong.value) is InvalidTrace
    with pytest.raises(SequenceConflict) as conflict:
        bank.write(tiny.trace(3, seed=5))
    assert conflict.value.details == {"seq": 0}
    with pytest.raises(BankNotFound):
        store.bank("ray/none").write(trace)
    with pytest.raises(InvalidInput, match=r"no node 'nowhere'; the nodes are node-1, node-2"):
        bank.migrate("nowhere")
    with pytest.raises(InvalidInput, match=r"no node 'nowhere'"):
        bank.attach("nowhere")
    with pytest.raises(Conflict, match=r"is hot on .*; move it: bank.migrate"):
        bank.attach(other_node(store, bank))


def test_a_caller_with_too_much_in_flight_is_refused(store, folder, bank, tiny):
    few = SETTINGS.model_copy(update={"host": HostSettings(caller_requests=2)})
    with raymem.connect("ray", settings=few) as impatient, ThreadPoolExecutor(12) as pool:
        theirs = impatient.bank(bank.name)
        calls = [pool.submit(theirs.write, tiny.trace(20, run=f"many-{index}")) for index in range(60)]
        errors = [call.exception() for call in calls]

    refused = [error for error in errors if error is not None]
    assert 0 < len(refused) < 60
    assert {type(error) for error in refused} == {Overloaded}
    assert bank.info().rows == 50 + 20 * (60 - len(refused))


def test_callers_behind_one_gateway_are_counted_each_for_itself(store, folder, bank, tiny):
    few = SETTINGS.model_copy(update={"host": HostSettings(caller_requests=2)})

    async def write(bank, key, run):
        caller.set(key)
        return await bank.write(tiny.trace(20, run=run))

    async def flood():
        gateway = await AsyncStore.connect("ray", settings=few)
        theirs = gateway.bank(bank.name)
        many = asyncio.gather(*(write(theirs, "a", f"a-{n}") for n in range(60)), return_exceptions=True)
        acks = [await asyncio.create_task(write(theirs, "b", f"b-{n}")) for n in range(5)]
        refused = [outcome for outcome in await many if isinstance(outcome, Overloaded)]
        await gateway.close()
        return acks, refused

    acks, refused = asyncio.run(flood())
    assert [ack.rows for ack in acks] == [20] * 5
    assert refused


def test_who_connects_later_needs_not_name_the_store_but_may_not_name_another(store, folder, bank, tmp_path):
    with raymem.connect("ray") as later:
        assert later.bank(bank.name).digest() == bank.digest()
    with raymem.connect("ray", cold=str(folder)) as same:
        assert [info.name for info in same.banks(bank.name)] == [bank.name]

    with pytest.raises(ConfigError, match=rf"{folder}, which .*elsewhere is not; leave cold out"):
        raymem.connect("ray", cold=str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_process_that_forks_or_leaves_ray_hears_so_and_can_connect_again(nodes, bank):
    driver = [sys.executable, str(Path(__file__).with_name("driver.py")), bank.name]
    ran = subprocess.run(driver, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert "StoreClosed: this store was opened in process" in found["forked"]["bank"]
    assert "multiprocessing's 'spawn'" in found["forked"]["anew"]
    assert found["forked"]["close"] == found["closed"] == "None"
    assert all("StoreClosed" in told and "connect again" in told for told in found["shut"].values())
    assert "StoreClosed" not in str(found["old"])
    assert found["old"]["digest"] == bank.digest()
    assert bank.tags() == {"t": 50}


def test_a_shard_killed_while_it_writes_loses_and_doubles_nothing(store, folder, bank, tiny, tmp_path):
    writers = Writers(bank, tiny, 4)
    while len(writers.acknowledged) < 200:
        time.sleep(0.005)
    os.kill(pid_of(store, bank.info().owner), signal.SIGKILL)
    killed, before = time.monotonic(), len(writers.acknowledged)
    while len(writers.acknowledged) < before + 200:
        time.sleep(0.005)
    print(f"acknowledging again {time.monotonic() - killed:.1f} s after kill -9")
    writers.stop()

    journal = journal_of(folder, bank.name)
    assert len(journal) == len(set(journal))
    assert set(journal) == writers.acknowledged
    assert bank.digest() == undisturbed_digest(journal, tmp_path / "undisturbed", tiny)


def test_moving_under_load_loses_nothing_and_answers_every_read(store, folder, bank, tiny, tmp_path):
    writers = Writers(bank, tiny, 2)
    reading, stop = ThreadPoolExecutor(1), threading.Event()

    def read_on() -> int:
        for count in itertools.count():
            if stop.is_set():
                return count
            assert bank.read(tiny.trace(3).hidden, 4).relevance_Q.shape == (3,)
        return 0

    answered = reading.submit(read_on)
    reports = [bank.migrate(other_node(store, bank)) for _ in range(4)]
    writers.stop()
    stop.set()

    assert answered.result() > 4
    reading.shutdown()
    for report in reports:
        print(f"{report.rows} rows moved in {report.total_ms:.0f} ms, writes paused {report.pause_ms:.0f} ms")
        assert 0 < report.pause_ms <= report.total_ms
    journal = journal_of(folder, bank.name)
    assert len(journal) == len(set(journal))
    assert set(journal) == writers.acknowledged
    assert bank.digest() == undisturbed_digest(journal, tmp_path / "undisturbed", tiny)


def test_keys_and_values_outlive_a_move_and_a_shard_killed_while_it_keeps_them(store, bank, tiny):
    bank.write(tiny.trace(640, run="long"))
    drawn = torch.randn(2, 3, 640, 2, 4, generator=torch.Generator().manual_seed(0))

    def put(seq: int) -> int:
        keys, values = drawn[:, :, seq : seq + 32]
        return bank.put_rows(AttendedRows("s", "long", seq, keys, values, rope="theta=10000")).rows

    with ThreadPoolExecutor(1) as putting:
        later = putting.submit(lambda: [put(seq) for seq in range(0, 640, 32)])
        while not bank.info().attended_rows:
            time.sleep(0.005)
        bank.migrate(other_node(store, bank))
        os.kill(pid_of(store, bank.info().owner), signal.SIGKILL)
        assert later.result()[-1] == 640
    assert bank.info().attended_rows == 640
    asked = tiny.trace(9, run="long", seq=320)
    found = bank.attend(asked.hidden, asked.tokens, 40)
    expected = AttendedRows("s", "long", 0, *drawn, rope="theta=10000").checked()
    of_run = [(slot, row.seq) for slot, row in enumerate(found.rows()) if row.run == "long"]
    assert len(of_run) >= 32
    # the bank's first rows, of another run, have none
    assert found.keys_LNHd is None
    keys, values = torch.ones(2, 3, 50, 2, 4)
    bank.put_rows(AttendedRows("s", "r", 0, keys, values, rope="theta=10000"))
    found = bank.attend(asked.hidden, asked.tokens, 40)
    for slot, seq in of_run:
        assert torch.equal(found.keys_LNHd[:, slot], expected.keys_LNHd[:, seq])
        assert torch.equal(found.value_scales_LNH[:, slot], expected.value_scales_LNH[:, seq])


def test_a_node_is_drained_while_its_banks_are_written_and_stays_so_whoever_dies(store, folder, tiny):
    made = [store.create(f"ray/drained-{index}", tiny.spec("spalm")) for index in range(4)]
    for bank in made:
        bank.write(tiny.trace(50))
        if bank.info().node != "node-2":
            bank.migrate("node-2")
    writers = [Writers(bank, tiny, 1) for bank in made[:2]]

    report = store.drain("node-2")

    for writer in writers:
        writer.stop()
    assert {move.bank for move in report.moved} >= {bank.name for bank in made}
    assert report.failed == {}
    ray.kill(ray.get_actor(cluster.DIRECTORY, namespace=NAMESPACE), no_restart=False)
    shards = {shard.node: shard for shard in store.shards()}
    assert (shards["node-2"].banks, shards["node-2"].draining, shards["node-1"].draining) == (0, True, False)
    assert store.create("ray/while-drained", tiny.spec("titans")).info().node == "node-1"
    with pytest.raises(Conflict, match="node-2 is being drained"):
        made[0].migrate("node-2")
    with pytest.raises(Conflict, match="can take its banks"):
        store.drain("node-1")
    for writer, bank in zip(writers, made, strict=False):
        journal = journal_of(folder, bank.name)
        assert len(journal) == len(set(journal))
        assert set(journal) == writer.acknowledged

    assert not store.drain("node-2", undo=True).draining
    assert made[0].migrate("node-2").target == "node-2"


def test_the_directory_may_die(store, folder, bank, tiny):
    ray.kill(ray.get_actor(cluster.DIRECTORY, namespace=NAMESPACE), no_restart=False)

    assert bank.write(tiny.trace(10, seq=50)).rows == 10
    with raymem.connect("ray") as fresh:
        assert fresh.bank(bank.name).digest() == bank.digest()
        assert fresh.nodes() == ["node-1", "node-2"]


def test_a_fan_out_has_an_error_where_a_shard_is_missing(store, bank):
    async def ask():
        owner = store.stats()["shards"][0]["owner"]
        return owner, await ask_all([Remote(owner), Remote("shard-none-0")], "bytes")

    owner, answers = asyncio.run(ask())

    assert isinstance(answers[owner], dict)
    assert isinstance(answers["shard-none-0"], BackendUnavailable)
    assert answers["shard-none-0"].details == {"shard": "shard-none-0", "gone": True}
    # as `stats` shows it
    assert backend_module._plain("shard-none-0", answers["shard-none-0"])["error"]["code"] == "backend_unavailable"


def test_a_shard_that_is_stopped_loses_its_banks_and_nothing_else(store, folder, bank, tiny, tmp_path):
    source = bank.info().node
    pid, writers = pid_of(store, bank.info().owner), Writers(bank, tiny, 2)
    while len(writers.acknowledged) < 100:
        time.sleep(0.005)
    os.kill(pid, signal.SIGSTOP)
    stopped, before = time.monotonic(), len(writers.acknowledged)
    try:
        while len(writers.acknowledged) < before + 100:
            time.sleep(0.005)
    finally:
        print(f"acknowledging again {time.monotonic() - stopped:.1f} s after SIGSTOP")
        # the directory has ended it by now, or will
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    writers.stop()

    assert bank.info().node != source
    journal = journal_of(folder, bank.name)
    assert len(journal) == len(set(journal))
    assert set(journal) == writers.acknowledged
    assert bank.digest() == undisturbed_digest(journal, tmp_path / "undisturbed", tiny)


def test_a_partition_whose_shard_is_stopped_is_an_error_or_marked_missing_and_comes_back(store, folder, tiny):
    bank = split_bank(store, tiny)
    for number in range(4):
        bank.write(tiny.trace(20, stream=f"s{number}", seed=number))
    queries = tiny.trace(4, seed=1).hidden
    whole, parts = bank.read(queries, 9), bank.info().partitions
    pid, owner = pid_of(store, parts[1].owner), parts[1].owner
    hasty = SETTINGS.model_copy(update={"actors": SETTINGS.actors.model_copy(update={"retry_s": 1.0})})
    with raymem.connect("ray", settings=hasty) as other:
        other.bank(bank.name).read(queries, 9)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(BackendUnavailable, match=rf"partition 1 of bank {bank.name}.*{owner}") as refused:
                other.bank(bank.name).read(queries, 9)
            some = other.bank(bank.name).read(queries, 9, allow_partial=True)
        finally:
            # the directory has ended it by now, or will
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert refused.value.details["partition"] == 1
    assert (some.partial, some.missing) == (True, (1,))
    assert {row.partition for row in some.rows(2)} == {0}

    # a caller with more patience gets the whole answer, from wherever the partition is by then
    assert torch.equal(bank.read(queries, 9).scores_Qk, whole.scores_Qk)
    os.kill(pid_of(store, bank.info().partitions[0].owner), signal.SIGKILL)
    assert bank.write(tiny.trace(30, stream="s0", seed=0)).duplicates == 20
    assert not bank.read(queries, 9).partial
    assert bank.info().rows == 90
    store.delete(bank.name)


def spread(store: Store, tiny, streams: int = 6) -> tuple[raymem.Bank, Writers]:
    """A bank in two partitions with some streams, each of which goes on being written."""
    bank = split_bank(store, tiny)
    bank.write(tiny.trace(50))
    return bank, Writers(bank, tiny, streams, apart=True)


def assert_every_row_once(folder: Path, bank: raymem.Bank, acknowledged: set[tuple[str, int]]) -> None:
    journals = [journal_of(folder, part.name) for part in bank.info().partitions]
    rows = [row for journal in journals for row in journal]
    assert len(rows) == len(set(rows))
    assert set(rows) == acknowledged
    # a run is a stream here
    assignments = [{run for run, _ in journal} for journal in journals]
    assert sum(map(len, assignments)) == len(set().union(*assignments))
    assert all(assignments)


@contextlib.contextmanager
def struck(pid: int, sig: signal.Signals) -> Iterator[None]:
    os.kill(pid, sig)
    try:
        yield
    finally:
        # the directory has ended it by now, or will
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


slow = pytest.mark.slow
STRIKES = [
    (signal.SIGKILL, "target"),
    pytest.param(signal.SIGKILL, "home", marks=slow),
    pytest.param(signal.SIGSTOP, "target", marks=slow),
    pytest.param(signal.SIGSTOP, "home", marks=slow),
]


@pytest.mark.parametrize(("sig", "victim"), STRIKES)
def test_a_shard_struck_while_streams_move_loses_and_doubles_nothing(store, folder, tiny, sig, victim):
    bank, writers = spread(store, tiny)
    while len(writers.acknowledged) < 300:
        time.sleep(0.005)
    bank.grow(3)
    parts = {part.name: part.owner for part in bank.info().partitions}
    pids = {name: pid_of(store, owner) for name, owner in parts.items()}
    cold = ColdStore.open(str(folder), "none")
    layout = cold.partitions.get(bank.name)
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(bank.rebalance)
        while not (moving := under_way(cold, layout)):
            assert not report.done()
        with struck(pids[layout.parts[getattr(moving[0], victim)]], sig):
            print(report.result())
            before = len(writers.acknowledged)
            while len(writers.acknowledged) < before + 100:
                time.sleep(0.005)
    writers.stop()
    while (again := bank.rebalance()).failed or again.streams:
        print(again)

    cold.partitions.require_still(cold.partitions.get(bank.name))
    assert_every_row_once(folder, bank, writers.acknowledged)
    assert bank.read(tiny.trace(4).hidden, 9).rows(2)[0].seq == 2
    store.delete(bank.name)


def under_way(cold: ColdStore, layout) -> list[Place]:
    places = [cold.partitions.find(layout.id, f"run-{number}") for number in range(6)]
    return [place for place in places if place is not None and place.target is not None]


@slow
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_a_shard_struck_while_a_bank_grows_loses_and_doubles_nothing(store, folder, tiny, sig):
    bank, writers = spread(store, tiny, 2)
    pid = pid_of(store, bank.info().partitions[1].owner)
    catalog = ColdStore.open(str(folder), "none").catalog
    with ThreadPoolExecutor(1) as pool:
        grown = pool.submit(bank.grow, 4)
        while len(catalog.list(f"{bank.name}.p")) < 4:
            assert not grown.done()
        with struck(pid, sig):
            assert [part.rows for part in grown.result().partitions[2:]] == [0, 0]
            before = len(writers.acknowledged)
            while len(writers.acknowledged) < before + 50:
                time.sleep(0.005)
    writers.stop()
    for number in range(2, 4):
        bank.write(tiny.trace(5, stream=f"run-{number}", run=f"run-{number}", seed=number))

    assert_every_row_once(folder, bank, writers.acknowledged | {(f"run-{n}", seq) for n in (2, 3) for seq in range(5)})
    store.delete(bank.name)


def test_banks_of_a_node_that_has_left_come_back_elsewhere_without_being_asked_for(nodes, store, bank, tiny):
    if bank.info().node != "node-2":
        bank.migrate("node-2")
    asleep = store.create(f"ray/bank-{next(names)}", tiny.spec("titans"))
    if asleep.info().node != "node-2":
        asleep.migrate("node-2")
    digest = bank.digest()

    # a directory that died and that nobody has called since watches as well
    ray.kill(ray.get_actor(cluster.DIRECTORY, namespace=NAMESPACE), no_restart=False)
    nodes.kill("node-2")
    left = time.monotonic()

    assert bank.write(tiny.trace(10, seq=50)).rows == 10
    print(f"acknowledging again {time.monotonic() - left:.1f} s after its node left")
    assert bank.info().node == "node-1"
    while asleep.info().node != "node-1":
        assert time.monotonic() - left < 120
        time.sleep(0.1)

    nodes.add("node-3")
    while "node-3" not in store.nodes():
        time.sleep(0.1)
    assert bank.migrate("node-3").target == "node-3"
    assert bank.digest() != digest


def test_raymem_ended_on_the_cluster_leaves_its_banks_in_the_store(store, folder, bank, tiny, monkeypatch):
    digest = bank.digest()
    asyncio.run(cluster.stop())

    with pytest.raises(ConfigError, match="name the cold store that its nodes share"):
        raymem.connect("ray")
    with raymem.connect(folder) as local:
        assert local.bank(bank.name).digest() == digest

    with monkeypatch.context() as patch:
        # the driver's answer alone differs: as if it had another store under the same path
        patch.setattr(ColdStore, "nonce", lambda self: "another")
        with pytest.raises(NotShared, match=rf"sees another cold store at {folder}"):
            raymem.connect("ray", cold=str(folder))
    with raymem.connect("ray", cold=str(folder)) as again:
        assert again.bank(bank.name).digest() == digest
