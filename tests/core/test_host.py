"""Many banks of one host: their small writes are committed together, and settle in time."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import raymem
from raymem import BankSpec, Calibration, Settings, Trace
from raymem.bank.replica import Replica
from raymem.config import ColdSettings
from raymem.errors import BankDetached, Moved, NotOwner, StorageError, StoreClosed, TooLarge
from raymem.host.host import Host
from raymem.storage.journal.log import Log
from raymem.storage.store import ColdStore
from raymem.storage.sweeper import sweep
from raymem.storage.tables.single_writer_table import SingleWriterTable
from raymem.storage.tables.tables import journal_table, log_table

Make = Callable[..., Trace]


@pytest.fixture(autouse=True)
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymem.host.host._TICK_S", 0.05)


async def attached(host: Host, spec: BankSpec, *names: str) -> None:
    for name in names:
        host.cold.catalog.create(name, spec)
        await host.attach(name)


def flushed_rows(cold: ColdStore, name: str) -> int:
    return int(cold.tables.open(journal_table(cold.catalog.get(name).id)).count_rows())


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.02)


async def test_writers_of_many_banks_share_few_commits(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host = Host(cold, Settings(), "me")
    names = [f"lab/{number}" for number in range(60)]
    await attached(host, bank_spec, *names)
    acks = await asyncio.gather(*(host.write(name, make_trace(2, run=name)) for name in names))
    assert {(ack.rows, ack.end) for ack in acks} == {(2, 2)}
    log = (await host.stats())["log"]
    assert log["commits"] <= 6
    assert log["group"] >= 10
    assert (log["held_banks"], log["rows"]) == (60, 120)
    await host.close()
    # closing settles all, and the log is gone
    assert all(flushed_rows(cold, name) == 2 for name in names[::50])
    assert not list(Path(cold.uri).glob("log-*"))


@pytest.mark.parametrize("how", ["detached", "evicted"])
async def test_the_memory_of_a_bank_that_left_is_free_at_once(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make, how: str
):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    await host.write("lab/a", make_trace(20))
    await host.read("lab/a", make_trace(3).hidden)
    primary = weakref.ref(host._owners["lab/a"].primary)
    gc.collect()
    gc.disable()
    try:
        await (host.detach("lab/a") if how == "detached" else host._evict("lab/a"))
        # the owner's task ends in its next turn
        await asyncio.sleep(0.05)
        assert primary() is None
    finally:
        gc.enable()
    await host.close()


async def test_a_lone_writer_does_not_wait_for_company(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    for seq in range(5):
        await host.write("lab/a", make_trace(1, seq=seq))
    assert (await host.stats())["log"]["commits"] == 5


async def test_a_follower_sees_rows_that_have_not_settled(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    elsewhere = ColdStore.open(cold.uri)
    follower = Replica(elsewhere, elsewhere.catalog.get("lab/a"))
    follower.recover()
    await host.write("lab/a", make_trace(20))
    assert flushed_rows(cold, "lab/a") == 0
    assert follower.catch_up() == 20
    assert follower.digest() == await host.digest("lab/a")
    await host.detach("lab/a")
    assert flushed_rows(cold, "lab/a") == 20
    assert follower.catch_up() == 0


@pytest.mark.parametrize("what", ["settle_bytes", "settle_s", "log_bytes"])
async def test_rows_settle_by_size_and_by_age(cold: ColdStore, bank_spec: BankSpec, make_trace: Make, what: str):
    value = {"settle_bytes": 500, "settle_s": 0.1, "log_bytes": 2000}[what]
    host = Host(cold, Settings(cold=ColdSettings(**{what: value})), "me")
    await attached(host, bank_spec, "lab/a")
    await host.write("lab/a", make_trace(15))
    await until(lambda: flushed_rows(cold, "lab/a") == 15)
    await until(lambda: host.ownership.group_commit.log.stats()["held_bytes"] == 0)
    assert (await host.stats())["log"]["settles"] == 1


async def test_a_bank_is_saved_by_bytes_and_by_age(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host = Host(cold, Settings(cold=ColdSettings(snapshot_s=0.2)), "me")
    await attached(host, bank_spec, "lab/a")
    await host.write("lab/a", make_trace(3))
    found = cold.snapshots(cold.catalog.get("lab/a")).latest
    assert found() is None
    await until(lambda: found() is not None)
    assert found()[0] == 3


async def test_taking_one_bank_away_costs_the_others_no_row(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host, other = Host(cold, Settings(), "me"), Host(ColdStore.open(cold.uri), Settings(), "you")
    await attached(host, bank_spec, "lab/a", "lab/b")
    for name in ("lab/a", "lab/b"):
        await host.write(name, make_trace(5))
    await other.attach("lab/a")
    assert (await other.write("lab/a", make_trace(7))).duplicates == 5
    # the log that both shared is shut: the one that was not taken has to be opened anew
    with pytest.raises(Moved, match="being reopened"):
        await host.write("lab/b", make_trace(7))
    assert not host.has("lab/b")
    await host.reopen("lab/b")
    ack = await host.write("lab/b", make_trace(7))
    assert (ack.rows, ack.duplicates, ack.end) == (2, 5, 7)
    with pytest.raises(Moved) as moved:
        await host.reopen("lab/a")
    assert moved.value.to == "you"


async def test_an_owner_that_was_replaced_hears_so(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host, other = Host(cold, Settings(), "me"), Host(ColdStore.open(cold.uri), Settings(), "you")
    await attached(host, bank_spec, "lab/a")
    await host.write("lab/a", make_trace(5))
    await other.attach("lab/a")
    with pytest.raises(NotOwner):
        await host.write("lab/a", make_trace(7))


async def test_a_failed_group_acknowledges_nobody_and_everybody_can_go_on(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make, monkeypatch: pytest.MonkeyPatch
):
    host = Host(cold, Settings(), "me")
    names = [f"lab/{number}" for number in range(5)]
    await attached(host, bank_spec, *names)

    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error", "disk")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        writes = (host.write(name, make_trace(3)) for name in names)
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert all(isinstance(outcome, StorageError) for outcome in outcomes)
    # some of the groups had landed; whoever repeats is told so, and nothing is there twice
    for name in names:
        ack = await host.write(name, make_trace(4))
        assert (ack.rows + ack.duplicates, ack.end) == (4, 4)
        assert [pos for rows in cold.journal(cold.catalog.get(name)).scan() for pos in rows.pos_T.tolist()] == [
            *range(4)
        ]


async def test_what_is_queued_before_a_detach_is_written_and_what_comes_later_refused(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make
):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    writes = [asyncio.ensure_future(host.write("lab/a", make_trace(1, seq=seq))) for seq in range(20)]
    await asyncio.sleep(0)
    await host.write("lab/a", make_trace(1, run="later"), durable=False)
    detach = asyncio.ensure_future(host.detach("lab/a"))
    await asyncio.sleep(0)
    with pytest.raises((BankDetached, Moved)):
        await host.write("lab/a", make_trace(1, run="too late"))
    acks = await asyncio.gather(*writes)
    await detach
    assert [ack.end for ack in acks] == list(range(1, 21))
    entry = cold.catalog.get("lab/a")
    assert (entry.log, entry.state, flushed_rows(cold, "lab/a")) == (None, "cold", 21)


def test_a_store_opened_again_by_another_process_has_what_the_log_held(
    tmp_path: Path, spec: BankSpec, calibration: Calibration, make_trace: Make, root: Path
):
    import subprocess
    import sys

    with raymem.connect(tmp_path / "memory") as store:
        store.put_calibration(calibration)
        for number in range(3):
            store.create(f"lab/{number}", spec)
    # a process that writes and dies without a word
    program = (
        "import os, sys, torch, raymem\n"
        "store = raymem.connect(sys.argv[1])\n"
        "for name in [info.name for info in store.banks()]:\n"
        f"    trace = raymem.Trace(torch.ones(4, 2, {spec.fingerprint.width}).bfloat16(), torch.arange(4), 's', 'r')\n"
        "    assert store.bank(name).write(trace).rows == 4\n"
        "os._exit(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "memory"], env={"PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == 9
    with raymem.connect(tmp_path / "memory") as store:
        assert [info.rows for info in store.banks()] == [4, 4, 4]
        for info in store.banks():
            assert store.bank(info.name).write(make_trace(2, run="other")).end == 6


async def test_a_log_that_an_upkeep_alone_finds_fenced_off_ends_the_incarnation(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make
):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a", "lab/b")
    await host.write("lab/a", make_trace(3))
    await host.write("lab/b", make_trace(3))
    first = cold.catalog.get("lab/a").log
    assert first is not None
    SingleWriterTable(cold.tables, log_table(first), "log", 1).fence()
    # its rows settle, and the upkeep that follows finds the log lost
    await host.detach("lab/b")
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(Moved, NotOwner):
                ack = await host.write("lab/a", make_trace(6))
                break
            with contextlib.suppress(Moved, NotOwner):
                await host.reopen("lab/a")
            await asyncio.sleep(0.02)
    assert (ack.duplicates, ack.end) == (3, 6)
    assert cold.catalog.get("lab/a").log not in (None, first)
    await host.close()


async def test_a_host_that_was_away_for_longer_than_its_lease_names_no_log_that_was_swept(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make
):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    await host.write("lab/a", make_trace(3))
    await host.detach("lab/a")
    first = host.ownership.lease
    # idle and out of reach: another process sees the lease run out, and sweeps what no bank names
    first.deadline -= first.lease_s
    other = ColdStore.open(cold.uri)
    for id in other.lease_table.list():
        other.lease_table.expire(id)
    assert log_table(first.id) in sweep(other, 0.0).deleted

    await host.attach("lab/a")
    assert (await host.write("lab/a", make_trace(5))).end == 5
    assert cold.catalog.get("lab/a").log not in (None, first.id)
    await host.close()


async def test_an_upkeep_of_the_log_that_fails_unforeseen_keeps_nobody_waiting(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make, monkeypatch: pytest.MonkeyPatch
):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a", "lab/b")
    await host.write("lab/a", make_trace(3))

    def fails(_: Log) -> bool:
        raise ValueError("nobody thought of this")

    async with asyncio.timeout(10):
        with monkeypatch.context() as patched:
            patched.setattr(Log, "maintain", fails)
            await host.detach("lab/a")
        assert (await host.stats())["log"]["upkeep_errors"] == 1
        await host.write("lab/b", make_trace(3))
        await host.close()


async def test_one_callers_long_reads_hold_up_nobody_else(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host = Host(cold, Settings(host={"threads": 2}), "me")
    await attached(host, bank_spec, "lab/a", "lab/b")
    rows = make_trace(4)
    await host.write("lab/a", rows)
    with host._owners["lab/a"].primary.lock:
        long = [asyncio.create_task(host.read("lab/a", rows.hidden, caller="many")) for _ in range(20)]
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert (await host.write("lab/b", rows, caller="one")).rows == 4
            assert len((await host.read("lab/b", rows.hidden, caller="one")).relevance_Q) == 4
        assert not any(task.done() for task in long)
    assert len(await asyncio.gather(*long)) == 20
    await host.close()


async def test_a_long_read_is_given_up_when_nobody_wants_it(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    rows = make_trace(200)
    await host.write("lab/a", rows)
    primary = host._owners["lab/a"].primary
    whole = await host.read("lab/a", rows.hidden, 3)
    first = primary.read(rows.hidden[:10], 3)
    assert whole.tokens_Qk is not None
    assert first.tokens_Qk is not None
    assert whole.tokens_Qk.shape == (200, 3)
    assert whole.tokens_Qk[:10].equal(first.tokens_Qk)
    asked: list[int] = []
    with pytest.raises(StoreClosed, match="being closed"):
        primary.read(rows.hidden, 3, 1, lambda: bool(asked.append(1)) or len(asked) < 3)
    assert len(asked) == 3
    await host.close()


async def test_a_read_whose_answer_is_too_large_is_refused(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    rows = make_trace(1)
    with pytest.raises(TooLarge, match="ask 1024 at once at most"):
        await host.read("lab/a", rows.hidden.expand(1025, -1, -1), 4096)
    with pytest.raises(TooLarge, match="ask 65536"):
        await host.read("lab/a", rows.hidden.expand(65537, -1, -1), 1)
    assert len((await host.read("lab/a", rows.hidden.expand(1024, -1, -1), 4096)).relevance_Q) == 1024
    await host.close()


async def test_rows_for_a_bank_that_is_leaving_are_refused_and_not_owed(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make
):
    host = Host(cold, Settings(), "me")
    await attached(host, bank_spec, "lab/a")
    leaving = asyncio.create_task(host.detach("lab/a"))
    heard = []
    while not leaving.done():
        try:
            await host.write("lab/a", make_trace(1, run="late", seq=len(heard)), durable=False)
        except (BankDetached, Moved) as error:
            heard.append(type(error))
        await asyncio.sleep(0)
    await leaving
    assert BankDetached in heard
    # rows that were accepted and lost would be told here
    await host.close()
