import asyncio
import dataclasses

import pytest
import torch

from raymem import MigrationReport, Readout, Settings
from raymem.actors.calls import watched
from raymem.actors.shard import ClusterSpec, Shard
from raymem.actors.transfer import pack, pack_fields, unpack_fields
from raymem.config import HostSettings
from raymem.errors import (
    BackendUnavailable,
    BankDetached,
    BankNotFound,
    Corrupt,
    Moved,
    NotOwner,
    NotShared,
    Overloaded,
)
from raymem.memory import kinds
from raymem.storage.journal.log import read_log
from raymem.storage.store import ColdStore
from raymem.storage.tables.tables import journal_table
from raymem.types import Selection


async def write(shard: Shard, name: str, trace):
    return await shard.write(name, pack_fields(trace), True, "tester")


async def read(shard: Shard, name: str, hidden: torch.Tensor) -> Readout:
    return unpack_fields(Readout, await shard.read(name, pack(hidden), 3, 1, "tester"))


@pytest.mark.parametrize("kind", kinds())
async def test_a_new_incarnation_has_its_banks_back_under_a_new_epoch(shards, bank, cold, tiny, kind):
    name = await bank(shards.start("one"), kind=kind)
    digest = await shards.peers["one"].shard.digest(name)
    epoch = cold.catalog.get(name).epoch

    again = shards.start("one")
    await again.start()

    assert await again.digest(name) == digest
    assert await again.bytes() != {}
    assert cold.catalog.get(name).epoch == epoch + 1
    assert (await write(again, name, tiny.trace(60))).duplicates == 50


async def test_an_incarnation_that_was_replaced_can_write_no_more(shards, bank, tiny):
    old = shards.start("one")
    name = await bank(old)
    await shards.start("one").digest(name)

    with pytest.raises(NotOwner):
        await write(old, name, tiny.trace(10, seq=50))


async def test_banks_nobody_asks_for_come_back_too(shards, bank):
    name = await bank(shards.start("one"))
    again = shards.start("one")

    await again.start()

    async with asyncio.timeout(10):
        while name not in await again.bytes():
            await asyncio.sleep(0.01)


async def test_a_bank_that_cannot_be_loaded_does_not_keep_the_others_back(shards, bank, cold):
    before = shards.start("one")
    broken, sound = await bank(before, "a/broken"), await bank(before, "a/sound")
    # its upkeep after the write has ended too
    await before.digest(broken)
    cold.tables.drop(journal_table(cold.catalog.get(broken).id))

    again = shards.start("one")

    assert await again.digest(sound)
    with pytest.raises(Corrupt):
        await again.digest(broken)
    # it is still this shard's to load, once it is whole
    assert cold.catalog.get(broken).owner == "one"


async def test_a_store_that_is_not_shared_is_refused_and_none_is_made(shards, cluster_spec: ClusterSpec, tmp_path):
    shards.spec = dataclasses.replace(cluster_spec, nonce="another")
    with pytest.raises(NotShared, match=r"sees another cold store at .*memory.*: put the cold store on storage"):
        await shards.start("one").start()

    absent = tmp_path / "absent"
    shards.spec = dataclasses.replace(cluster_spec, cold=str(absent))
    with pytest.raises(NotShared, match=str(absent)):
        await shards.start("two").start()
    assert not absent.exists()


async def test_a_bank_is_answered_for_only_where_it_is(shards, bank, tiny, cold: ColdStore):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)

    with pytest.raises(Moved) as moved:
        await write(two, name, tiny.trace())
    assert moved.value.to == "one"
    with pytest.raises(Moved) as refused:
        await two.attach(name, "someone")
    assert refused.value.to == "one"

    await one.detach(name)
    for shard in (one, two):
        with pytest.raises(BankDetached, match="attach it first"):
            await read(shard, name, tiny.trace(1).hidden)
    assert cold.catalog.get(name).owner is None


async def test_a_bank_can_be_taken_from_an_owner_that_is_gone(shards, bank):
    name = await bank(shards.start("one"))
    two = shards.start("two")

    await two.attach(name, "one")

    assert await two.locate(name) == "two"


async def test_using_a_bank_while_it_detaches_does_not_bring_it_back(shards, bank, cold, tiny):
    shard = shards.start("one")
    name = await bank(shard)

    outcomes = await asyncio.gather(
        shard.detach(name), *(read(shard, name, tiny.trace(1).hidden) for _ in range(20)), return_exceptions=True
    )

    assert cold.catalog.get(name).state == "cold"
    assert all(isinstance(outcome, Readout | BankDetached) for outcome in outcomes[1:])


async def test_a_bank_that_is_to_be_removed_is_let_go_unseen_and_nobody_brings_it_back(shards, bank, cold, tiny):
    shard = shards.start("one")
    name = await bank(shard)
    cold.tables.open("catalog").update(where=f"name = '{name}'", values={"spec": "{"})

    await shard.discard(name)
    await shard.discard(name)

    line = cold.catalog.line(name)
    assert (line.state, line.owner, await shard.bytes()) == ("cold", None, {})
    cold.remove(name)
    with pytest.raises(BankNotFound):
        await write(shard, name, tiny.trace(1))


@pytest.mark.parametrize("kind", kinds())
async def test_a_move_takes_every_row_along(shards, bank, cold, tiny, kind):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one, kind=kind, rows=300)
    digest = await one.digest(name)

    report = await one.migrate(name, "two")

    assert isinstance(report, MigrationReport)
    assert (report.source, report.target, report.rows) == ("one", "two", 300)
    assert 0 < report.pause_ms <= report.total_ms
    assert await two.digest(name) == digest
    assert await one.bytes() == {}
    assert cold.catalog.get(name).owner == "two"
    with pytest.raises(Moved) as moved:
        await write(one, name, tiny.trace())
    assert moved.value.to == "two"


async def test_a_move_to_itself_moves_nothing(shards, bank):
    one = shards.start("one")
    name = await bank(one)

    assert await one.migrate(name, "one") == MigrationReport(name, "one", "one", 0, 0.0, 0.0)


async def test_during_the_hand_over_reads_are_answered_and_writes_wait_and_are_sent_on(shards, bank, tiny):
    one = shards.start("one")
    name = await bank(one)
    host = await one._host()

    await host.yield_writes(name, "two")

    writing = asyncio.create_task(write(one, name, tiny.trace()))
    assert torch.isfinite((await read(one, name, tiny.trace(3).hidden)).relevance_Q).all()
    with pytest.raises(Moved):
        await host.yield_writes(name, "three")
    assert not writing.done()
    await host.forget_moved(name)
    with pytest.raises(Moved) as moved:
        await writing
    assert moved.value.to == "two"


async def test_writes_that_waited_for_a_hand_over_go_on_where_it_failed(shards, bank, tiny):
    one = shards.start("one")
    name = await bank(one)
    host = await one._host()
    await host.yield_writes(name, "two")
    writing = asyncio.create_task(write(one, name, tiny.trace(10, seq=50)))

    await host.resume(name)

    assert (await writing).end == 60


@pytest.mark.parametrize(("step", "when"), [("prepare", "before"), ("prepare", "after"), ("adopt", "before")])
async def test_when_the_target_dies_the_source_serves_on(shards, bank, cold, tiny, step, when):
    one = shards.start("one")
    shards.start("two")
    name = await bank(one)
    digest = await one.digest(name)
    shards.peers["two"].dies = {step: when, "abandon": "before"}

    with pytest.raises(BackendUnavailable, match="two does not answer"):
        await one.migrate(name, "two")

    assert await one.digest(name) == digest
    assert cold.catalog.get(name).owner == "one"
    assert (await write(one, name, tiny.trace(10, seq=50))).rows == 10


async def test_a_target_that_took_the_bank_and_can_not_say_so_keeps_it(shards, bank, cold, tiny):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    digest = await one.digest(name)
    shards.peers["two"].dies = {"adopt": "after", "abandon": "before"}
    moving = asyncio.create_task(one.migrate(name, "two"))

    with pytest.raises(BackendUnavailable, match="two does not answer"):
        await moving

    assert cold.catalog.get(name).owner == "two"
    with pytest.raises(Moved) as moved:
        await write(one, name, tiny.trace(10, seq=50))
    assert moved.value.to == "two"
    assert await two.digest(name) == digest


@pytest.mark.parametrize("lease_s", [1.0])
async def test_a_target_that_is_silent_for_a_lease_does_not_keep_writes_waiting(shards, bank, cold, tiny):
    one = shards.start("one")
    shards.start("two")
    name = await bank(one)
    shards.peers["two"].dies = dict.fromkeys(["adopt", "bytes", "abandon"], "silent")
    moving = asyncio.create_task(one.migrate(name, "two"))
    host = await one._host()
    while name not in host._departing:
        await asyncio.sleep(0.01)
    writing = asyncio.create_task(write(one, name, tiny.trace(10, seq=50)))

    with pytest.raises(BackendUnavailable, match="two gave no answer within 1 s"):
        await moving

    assert (await writing).end == 60
    assert cold.catalog.get(name).owner == "one"


async def test_one_who_takes_long_is_waited_for_while_it_answers(shards):
    shards.start("two")
    peer = shards.peers["two"]

    async def slow() -> str:
        await asyncio.sleep(0.3)
        return "done"

    peer.shard.slow = slow
    assert await watched(peer, "slow", silence_s=0.1) == "done"
    peer.dies = {"bytes": "silent"}
    with pytest.raises(BackendUnavailable, match=r"two gave no answer within 0\.1 s"):
        await watched(peer, "slow", silence_s=0.1)


async def test_an_erasure_right_after_a_move_is_complete(shards, bank, cold, tiny):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    other = await bank(one, name="a/other")
    await one.migrate(name, "two")

    receipt = await two.erase(name, Selection(stream="s", run="r", seq_from=3, seq_to=9), rebuild=False)

    assert (receipt.rows, receipt.status, receipt.proves) == (6, "complete", True)
    log = (await one._host()).ownership.lease.id
    assert [len(rows) for rows in read_log(cold.tables, log, cold.catalog.get(other))] == [50]


@pytest.mark.parametrize("again", [True, False])
async def test_what_is_erased_during_a_move_does_not_move(shards, bank, again):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    source, target = await one._host(), await two._host()
    await target.prepare(name)
    await one.erase(name, Selection(stream="s", run="r", seq_from=3, seq_to=9), rebuild=False)
    digest = await one.digest(name)
    if again:
        await target.prepare(name)

    await target.adopt(name, await source.yield_writes(name, "two"))

    assert await two.digest(name) == digest


async def test_a_source_that_dies_in_the_hand_over_still_owns_the_bank(shards, bank, tiny):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    await two.prepare(name)
    await (await one._host()).yield_writes(name, "two")

    again = shards.start("one")

    assert (await write(again, name, tiny.trace(60))).duplicates == 50
    with pytest.raises(Moved):
        await write(two, name, tiny.trace())


async def test_a_target_that_comes_too_late_gets_nothing(shards, bank, cold):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    await two.prepare(name)
    yielded = await (await one._host()).yield_writes(name, "two")
    again = shards.start("one")
    assert await again.locate(name) == "one"

    with pytest.raises(NotOwner):
        await two.adopt(name, yielded)

    assert cold.catalog.get(name).owner == "one"


async def test_a_copy_that_nobody_comes_back_for_is_dropped(shards, bank, monkeypatch):
    monkeypatch.setattr("raymem.host.handover._ARRIVAL_S", 0.05)
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    await two.prepare(name)

    async with asyncio.timeout(10):
        while (await two._host())._arriving:
            await asyncio.sleep(0.01)
    # the move still works, only with a longer pause
    assert (await one.migrate(name, "two")).rows == 50


@pytest.mark.parametrize("there_already", [False, True])
async def test_a_copy_that_could_not_be_made_ready_stands_in_nobodys_way(shards, bank, monkeypatch, there_already):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    if there_already:
        await two.prepare(name)

    def fails(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("raymem.bank.replica.Replica.catch_up", fails)
        with pytest.raises(OSError, match="the disk is gone"):
            await two.prepare(name)
        with pytest.raises(OSError, match="the disk is gone"):
            await two.prepare(name)

    await two.abandon(name)
    await two.abandon(name)
    assert (await one.migrate(name, "two")).rows == 50


async def test_two_moves_at_once_leave_one_owner(shards, bank, cold):
    one, two, three = shards.start("one"), shards.start("two"), shards.start("three")
    name = await bank(one)
    digest = await one.digest(name)

    outcomes = await asyncio.gather(one.migrate(name, "two"), one.migrate(name, "three"), return_exceptions=True)

    assert sum(isinstance(outcome, MigrationReport) for outcome in outcomes) == 1
    hot = [shard for shard in (one, two, three) if name in await shard.bytes()]
    assert [shard.name for shard in hot] == [cold.catalog.get(name).owner]
    assert await hot[0].digest(name) == digest


async def test_rows_written_during_a_move_are_neither_lost_nor_doubled(shards, bank, cold, tiny):
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one, rows=1)
    acknowledged = []

    async def writer(run: str) -> None:
        where = one
        for seq in range(0, 200, 5):
            trace = tiny.trace(5, run=run, seq=seq)
            while True:
                try:
                    acknowledged.append((run, seq, (await write(where, name, trace)).rows))
                    break
                except Moved as moved:
                    where = {"one": one, "two": two}.get(moved.to, where)
                    await asyncio.sleep(0.001)

    writers = asyncio.gather(*(writer(f"run-{index}") for index in range(4)))
    await asyncio.sleep(0.05)
    report = await one.migrate(name, "two")
    await writers

    parts = cold.journal(cold.catalog.get(name)).scan()
    rows = [row for part in parts for row in zip(part.runs, part.seq_T.tolist(), strict=True)]
    expected = {("r", 0)} | {(run, seq + row) for run, seq, count in acknowledged for row in range(count)}
    assert len(rows) == len(set(rows)) == 801
    assert set(rows) == expected
    assert 0 < report.rows < 801


async def test_a_caller_with_too_much_in_flight_is_refused_and_others_are_not(shards, bank, cluster_spec, tiny):
    few = Settings(host=HostSettings(caller_requests=2))
    shards.spec = dataclasses.replace(cluster_spec, settings=few)
    shard = shards.start("one")
    name = await bank(shard)

    ten = (shard.write(name, pack_fields(tiny.trace(1, run=str(run))), True, "greedy") for run in range(10))
    modest = shard.write(name, pack_fields(tiny.trace(1, run="modest")), True, "modest")
    outcomes = await asyncio.gather(*ten, modest, return_exceptions=True)

    refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
    assert len(refused) == 8
    assert all(error.retry_after_s > 0 for error in refused)
    assert outcomes[-1].rows == 1
    assert (await shard.stats())["refused_overload"] == 8
