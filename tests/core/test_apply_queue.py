"""Small writes are acknowledged once they are durable and applied together later: only the time tells."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from raymem import BankSpec, Settings, Trace
from raymem.bank.primary import ApplyQueue, Executor, Primary, run_now
from raymem.bank.replica import Replica
from raymem.errors import Moved, RaymemError, SequenceConflict
from raymem.host.host import Host
from raymem.rows import JournalRows
from raymem.storage.store import ColdStore

Make = Callable[..., Trace]


@pytest.fixture(params=["spalm", "titans", "dnc"])
def bank_spec(request: pytest.FixtureRequest, tiny: Any) -> BankSpec:
    return tiny.spec(request.param)


def opened(cold: ColdStore, spec: BankSpec) -> Primary:
    cold.catalog.create("lab/a", spec)
    return Primary.open(cold, cold.catalog.claim("lab/a", "me", 0))


def write(primary: Primary, *traces: Trace) -> list[object]:
    """As an owner does, which leaves small groups for later."""
    return list(run_now(primary.write(traces, Executor())))


def test_rows_wait_until_somebody_looks_and_the_state_is_that_of_the_journal(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make
):
    primary = opened(cold, bank_spec)
    for seq in range(0, 30, 3):
        write(primary, make_trace(3, seq=seq), make_trace(2, run=f"other-{seq}", seed=seq))
    assert (primary.pos, primary.end) == (0, 50)
    digest = primary.digest()
    assert (primary.pos, primary.end) == (50, 50)
    replica = Replica(cold, primary.entry)
    replica.catch_up()
    assert digest == replica.digest()


@pytest.mark.parametrize("look", ["read", "digest", "snapshot", "mark", "own"])
def test_whoever_looks_sees_every_committed_row(cold: ColdStore, bank_spec: BankSpec, make_trace: Make, look: str):
    primary = opened(cold, bank_spec)
    write(primary, make_trace(7))
    match look:
        case "read":
            relevance = primary.read(make_trace(7).hidden[2:3], k=1).relevance_Q
            assert relevance.item() == pytest.approx(1.0)
        case "mark":
            assert primary.mark("here") == {"here": 7}
        case "own":
            primary.own(primary.entry)
        case _:
            getattr(primary, look)()
    assert primary.end == 7
    assert primary.digest() == fresh_digest(cold, primary)


def fresh_digest(cold: ColdStore, primary: Primary) -> str:
    replica = Replica(cold, primary.entry)
    replica.recover()
    return replica.digest()


def test_rows_that_wait_are_recognised_when_they_come_again(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    primary = opened(cold, bank_spec)
    write(primary, make_trace(4))
    assert primary._at_hand([make_trace(3, seq=4)])
    assert not primary._at_hand([make_trace(3, seq=3)])
    assert not primary._at_hand([make_trace(3, seq=4), make_trace(3, seq=4)])
    (again,) = write(primary, make_trace(6))
    assert (again.rows, again.duplicates, again.gaps, again.end) == (2, 4, 0, 6)
    (other,) = write(primary, make_trace(2, seq=1, seed=5))
    assert isinstance(other, SequenceConflict)
    assert primary.pos == 0
    assert primary.digest() == fresh_digest(cold, primary)


def test_many_rows_become_due(cold: ColdStore, bank_spec: BankSpec, make_trace: Make):
    primary = opened(cold, bank_spec)
    write(primary, make_trace(40))
    assert not primary.apply_queue.due
    write(primary, make_trace(40, seq=40))
    assert primary.apply_queue.due
    primary.apply_queued()
    assert not primary.apply_queue.due


def test_large_groups_are_applied_at_once_behind_those_that_wait(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make
):
    primary = opened(cold, bank_spec)
    write(primary, make_trace(4))
    write(primary, make_trace(1200, seq=4))
    assert primary.pos == 1204
    assert primary.digest() == fresh_digest(cold, primary)


def rows_at(pos: int, make_trace: Make) -> JournalRows:
    return JournalRows.of(make_trace(2, seq=pos), pos, 0)


def test_one_applies_at_a_time_and_what_comes_meanwhile_stays(make_trace: Make):
    apply_queue = ApplyQueue()
    apply_queue.add(rows_at(0, make_trace))
    began, go_on, applied = threading.Event(), threading.Event(), []

    def slow(rows: JournalRows) -> None:
        began.set()
        assert go_on.wait(10)
        applied.append(rows.pos_T.tolist())

    threads = [threading.Thread(target=apply_queue.apply, args=(slow,)) for _ in range(2)]
    threads[0].start()
    assert began.wait(10)
    apply_queue.add(rows_at(2, make_trace))
    threads[1].start()
    # the state doesn't know them before they are applied
    assert (apply_queue.waiting.heads["s", "r"], apply_queue.waiting.end) == (4, 4)
    go_on.set()
    for thread in threads:
        thread.join()
    assert applied == [[0, 1], [2, 3]]
    assert (dict(apply_queue.waiting.heads), apply_queue.waiting.end) == ({}, None)


def test_who_waited_for_an_application_that_failed_does_not_repeat_it(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make, monkeypatch: pytest.MonkeyPatch
):
    primary = opened(cold, bank_spec)
    write(primary, make_trace(4))
    began, go_on, applied = threading.Event(), threading.Event(), []

    def fail_late(replica: Replica, rows: JournalRows) -> None:
        applied.append(rows)
        began.set()
        assert go_on.wait(10)
        raise MemoryError("no room")

    monkeypatch.setattr(Replica, "replay", fail_late)
    refused = []

    def look() -> None:
        with pytest.raises(RaymemError, match="will be reopened"):
            primary.apply_queued()
        refused.append(1)

    threads = [threading.Thread(target=look) for _ in range(2)]
    threads[0].start()
    assert began.wait(10)
    threads[1].start()
    # the second one is past every check that comes before the wait
    time.sleep(0.1)
    go_on.set()
    for thread in threads:
        thread.join()
    assert (len(applied), len(refused)) == (1, 2)
    assert primary.snapshot_pos == 0
    with pytest.raises(RaymemError):
        primary.snapshot()


def test_nobody_sees_half_of_a_change(make_trace: Make):
    apply_queue, wrong = ApplyQueue(), []
    done = threading.Event()

    def apply() -> None:
        while not done.is_set():
            apply_queue.apply(lambda rows: None)

    known = 0
    interval = sys.getswitchinterval()
    # threads take turns within a few instructions
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=apply)
    try:
        thread.start()
        for pos in range(0, 1000, 2):
            apply_queue.add(rows_at(pos, make_trace))
            known = pos + 2
            for _ in range(5):
                end, head = apply_queue.waiting.end, apply_queue.waiting.heads.get(("s", "r"))
                wrong += [found for found in (end, head) if found not in (None, known)]
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []


async def test_a_bank_is_not_reopened_beside_a_commit_of_its_former_owner(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make, monkeypatch: pytest.MonkeyPatch
):
    host = Host(cold, Settings(), "me")
    cold.catalog.create("lab/a", bank_spec)
    await host.attach("lab/a")
    await host.write("lab/a", make_trace(5))
    group_commit, go_on = host._owners["lab/a"].group_commit, asyncio.Event()
    commit = group_commit.commit

    async def slow(part: object) -> None:
        await go_on.wait()
        await commit(part)

    with monkeypatch.context() as patch:
        patch.setattr(group_commit, "commit", slow)
        under_way = asyncio.ensure_future(host.write("lab/a", make_trace(3, seq=5)))
        await asyncio.sleep(0.05)
        patch.setattr(Primary, "replay", fail)
        with pytest.raises(RaymemError, match="will be reopened"):
            await host.read("lab/a", make_trace(1).hidden)
    reopened = asyncio.ensure_future(host.reopen("lab/a"))
    await asyncio.sleep(0.2)
    assert not reopened.done()
    go_on.set()
    await reopened
    assert (await under_way).end == 8
    ack = await host.write("lab/a", make_trace(9))
    assert (ack.rows, ack.duplicates, ack.end) == (1, 8, 9)
    await host.close()


async def test_a_bank_that_nobody_reads_is_brought_up_to_date(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raymem.host.host._TICK_S", 0.05)
    monkeypatch.setattr("raymem.bank.primary._MOST_S", 0.1)
    host = Host(cold, Settings(), "me")
    cold.catalog.create("lab/a", bank_spec)
    await host.attach("lab/a")
    await host.write("lab/a", make_trace(5))
    primary = host._owners["lab/a"].primary
    assert primary.pos == 0
    async with asyncio.timeout(10):
        while primary.pos < 5:
            await asyncio.sleep(0.02)
    await host.close()


@pytest.mark.parametrize("who", ["reader", "writer"])
async def test_rows_that_cannot_be_applied_cost_a_reopening_and_nothing_else(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make, monkeypatch: pytest.MonkeyPatch, who: str
):
    host = Host(cold, Settings(), "me")
    cold.catalog.create("lab/a", bank_spec)
    await host.attach("lab/a")
    await host.write("lab/a", make_trace(5))
    with monkeypatch.context() as patch:
        patch.setattr(Primary, "replay", fail)
        if who == "reader":
            with pytest.raises(RaymemError, match="will be reopened"):
                await host.read("lab/a", make_trace(1).hidden)
        else:
            with pytest.raises(RaymemError, match="will be reopened"):
                await host.write("lab/a", make_trace(1200, seq=5))
    with pytest.raises(Moved):
        await host.write("lab/a", make_trace(1, seq=5))
    await host.reopen("lab/a")
    # the writer's rows were committed, though not acknowledged
    ack = await host.write("lab/a", make_trace(1200, seq=5))
    assert (ack.rows, ack.duplicates) == ((1200, 0) if who == "reader" else (0, 1200))
    assert cold.journal(cold.catalog.get("lab/a")).end() == 1205
    await host.close()


def fail(primary: Primary, rows: JournalRows) -> None:
    raise ArithmeticError("out of numbers")


@pytest.mark.parametrize("bank_spec", ["spalm"], indirect=True)
async def test_a_read_after_an_ack_sees_its_rows_while_others_write(
    cold: ColdStore, bank_spec: BankSpec, make_trace: Make
):
    host = Host(cold, Settings(), "me")
    cold.catalog.create("lab/a", bank_spec)
    await host.attach("lab/a")

    async def writer(run: str, seed: int) -> None:
        # the first row of a run is the attention sink, which no bank keeps
        await host.write("lab/a", make_trace(2, run=run, seed=seed))
        for seq in range(2, 40, 2):
            trace = make_trace(2, run=run, seq=seq, seed=seed)
            await host.write("lab/a", trace)
            # the second row waits for its next token
            found = await host.read("lab/a", trace.hidden[:1], k=1)
            assert (found.sources[found.source_Qk.item()], found.seq_Qk.item()) == (("s", run), seq)

    await asyncio.gather(*(writer(f"run-{number}", number) for number in range(6)))
    await host.close()
