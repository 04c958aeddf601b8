import asyncio

import pytest

from raymem.actors.directory import Rehoming
from raymem.actors.placement import Node, RunningShard
from raymem.errors import Moved, NotOwner

LEASE_S = 0.6
NAMES = [f"shard-{letter}-0" for letter in "abcd"]


@pytest.fixture
def lease_s() -> float:
    return LEASE_S


@pytest.fixture
def restarted() -> list[str]:
    return []


@pytest.fixture
def rehoming(shards, cold, restarted):
    async def restart(name: str) -> None:
        restarted.append(name)

    def make() -> Rehoming:
        def living() -> list[RunningShard]:
            return [RunningShard(name, Node(name, name)) for name in shards.peers]

        return Rehoming(cold, LEASE_S, living, shards.peers.__getitem__, restart)

    return make


async def stop(shards, name: str) -> None:
    """As SIGSTOP would: it answers nobody and its lease is not renewed."""
    host = await shards.peers[name].shard._host()
    host.ownership.lease.beat = lambda: None
    shards.peers[name].dies = dict.fromkeys(["bytes", "attach"], "silent")


async def until_owned(cold, names, elsewhere_than: str) -> None:
    async with asyncio.timeout(30):
        while any(cold.catalog.get(name).owner == elsewhere_than for name in names):
            await asyncio.sleep(0.02)


async def served(shards, cold, name: str) -> str:
    """The digest at whoever owns a bank; on a busy machine an owner's short lease may run out once more."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await shards.peers[cold.catalog.get(name).owner].shard.digest(name)
            except (Moved, NotOwner):
                await asyncio.sleep(LEASE_S / 3)


async def test_banks_of_a_silent_shard_are_spread_by_bytes_without_anybody_asking(
    shards, bank, cold, tiny, rehoming, restarted
):
    one, *others = (shards.start(name) for name in NAMES)
    large = [await bank(one, f"a/large-{index}", rows=400) for index in range(3)]
    small = [await bank(one, f"a/small-{index}", rows=20) for index in range(3)]
    digests = {name: await one.digest(name) for name in large + small}
    await stop(shards, one.name)

    task = asyncio.create_task(rehoming().keep_up())
    await until_owned(cold, large + small, one.name)

    assert {cold.catalog.get(name).owner for name in large} == {shard.name for shard in others}
    assignments = {name: shards.peers[cold.catalog.get(name).owner].shard for name in large + small}
    assert {name: await assignments[name].digest(name) for name in assignments} == digests
    async with asyncio.timeout(10):
        while restarted != [one.name]:
            await asyncio.sleep(0.02)
    task.cancel()


async def test_a_shard_that_wakes_after_it_was_replaced_neither_answers_nor_acknowledges(
    shards, bank, cold, tiny, rehoming
):
    from raymem.actors.transfer import pack, pack_fields

    one, two = shards.start(NAMES[0]), shards.start(NAMES[1])
    name = await bank(one)
    await stop(shards, one.name)
    task = asyncio.create_task(rehoming().keep_up())
    await until_owned(cold, [name], one.name)
    await two.write(name, pack_fields(tiny.trace(10, seq=50)), True, "")
    task.cancel()

    with pytest.raises((Moved, NotOwner)):
        await one.read(name, pack(tiny.trace(2).hidden), 3, 1, "")
    with pytest.raises((Moved, NotOwner)):
        await one.write(name, pack_fields(tiny.trace(10, seq=50)), True, "")
    assert await one.bytes() == {}


async def test_shards_that_live_keep_their_banks(shards, bank, cold, rehoming):
    one, _ = shards.start(NAMES[0]), shards.start(NAMES[1])
    name = await bank(one)
    task = asyncio.create_task(rehoming().keep_up())

    await asyncio.sleep(3 * LEASE_S)

    assert cold.catalog.get(name).owner == one.name
    assert cold.catalog.get(name).epoch == 1
    task.cancel()


async def test_two_that_watch_do_no_harm(shards, bank, cold, rehoming):
    one, *_ = (shards.start(name) for name in NAMES)
    names = [await bank(one, f"a/b-{index}") for index in range(8)]
    digests = {name: await one.digest(name) for name in names}
    await stop(shards, one.name)

    tasks = [asyncio.create_task(rehoming().keep_up()) for _ in range(2)]
    await until_owned(cold, names, one.name)
    await asyncio.sleep(LEASE_S)

    for name in names:
        hot = [peer.shard for key, peer in shards.peers.items() if key != one.name and name in await peer.shard.bytes()]
        # one that lost the race finds out at its next call
        answers = await asyncio.gather(*(shard.digest(name) for shard in hot), return_exceptions=True)
        assert all(answer == digests[name] or isinstance(answer, Moved | NotOwner) for answer in answers)
        assert await served(shards, cold, name) == digests[name]
    for task in tasks:
        task.cancel()


async def test_a_bank_held_outside_the_cluster_is_left_alone(shards, bank, cold, rehoming):
    outside = shards.start("process 1")
    name = await bank(outside)
    await stop(shards, "process 1")
    del shards.peers["process 1"]
    shards.start(NAMES[0])
    task = asyncio.create_task(rehoming().keep_up())

    await asyncio.sleep(3 * LEASE_S)

    assert cold.catalog.get(name).owner == "process 1"
    task.cancel()


async def test_a_bank_that_its_owner_claimed_again_is_not_taken_from_it(shards, bank, cold):
    name = await bank(shards.start("one"))
    two, seen = shards.start("two"), cold.catalog.get(name)
    # under the same name, as an actor that was restarted
    again = shards.start("one")
    await again.digest(name)

    with pytest.raises(Moved):
        await two.attach(name, "one", seen.epoch)

    assert cold.catalog.get(name).owner == "one"
    assert await two.bytes() == {}
