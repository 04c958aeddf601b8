import asyncio
import dataclasses

import pytest

from raymem.actors import directory as module
from raymem.actors.directory import Directory
from raymem.actors.placement import Node, RunningShard, node_prefix, shard_name
from raymem.actors.shard import ClusterSpec
from raymem.errors import BankNotFound, Conflict, NotShared, Unavailable

FRONT, BACK = Node("f" * 56, "front"), Node("b" * 56, "back")


class OneProcess:
    """A cluster of plain shards in this process, some of whose nodes see another cold store."""

    def __init__(self, shards) -> None:
        self.shards = shards
        self.alive = [FRONT]
        self.apart: set[str] = set()
        self.full: set[str] = set()
        self.started: list[str] = []
        self.stopped: list[str] = []

    def nodes(self) -> list[Node]:
        return list(self.alive)

    async def start_shard(self, spec: ClusterSpec, node: Node, index: int) -> RunningShard:
        name = shard_name(node.id, index)
        if node.name in self.full:
            raise Unavailable(f"no room on {node.name}")
        self.shards.spec = dataclasses.replace(spec, nonce="another") if node.name in self.apart else spec
        self.started.append(name)
        await self.shards.start(name).start()
        return RunningShard(name, node)

    async def stop_shard(self, name: str) -> None:
        self.stopped.append(name)

    async def restart_shard(self, name: str) -> None:
        self.stopped.append(name)

    def shard(self, name: str):
        return self.shards.peers[name]


@pytest.fixture
def cluster(shards) -> OneProcess:
    return OneProcess(shards)


@pytest.fixture
def directory(cluster_spec, cluster) -> Directory:
    return Directory(cluster_spec, lambda: cluster)


async def test_every_node_gets_its_shards_once(directory, cluster):
    cluster.alive = [FRONT, BACK]

    first, second = await asyncio.gather(directory.ensure(), directory.ensure())

    assert first.nodes == second.nodes == ["back", "front"]
    assert sorted(cluster.started) == [shard_name(BACK.id, 0), shard_name(FRONT.id, 0)]


async def test_nodes_that_join_are_served_and_nodes_that_leave_forgotten(directory, cluster, monkeypatch):
    monkeypatch.setattr(module, "_REFRESH_S", 0.01)
    await directory.ensure()

    cluster.alive = [BACK]

    async with asyncio.timeout(10):
        while shard_name(BACK.id, 0) not in cluster.started:
            await asyncio.sleep(0.01)
    assert (await directory.ensure()).nodes == ["back"]


async def test_a_node_that_sees_another_store_is_reported_and_asked_again_only_on_demand(directory, cluster):
    cluster.alive, cluster.apart = [FRONT, BACK], {"back"}

    topology = await directory.ensure()
    assert topology.nodes == ["front"]
    assert isinstance(topology.failures["back"], NotShared)
    assert cluster.stopped == [shard_name(BACK.id, 0)]

    cluster.apart = set()
    assert (await directory.ensure(retry_failed=False)).nodes == ["front"]
    repaired = await directory.ensure()
    assert repaired.nodes == ["back", "front"]
    assert repaired.failures == {}


async def test_a_node_without_room_is_asked_again_at_every_round(directory, cluster):
    cluster.full = {"front"}
    assert list((await directory.ensure()).failures) == ["front"]

    cluster.full = set()

    assert (await directory.ensure(retry_failed=False)).nodes == ["front"]


async def test_a_node_that_is_drained_takes_no_bank_and_every_directory_knows(
    directory, cluster, cluster_spec, shards, bank, cold
):
    cluster.alive = [FRONT, BACK]
    front, back = shard_name(FRONT.id, 0), shard_name(BACK.id, 0)
    await directory.ensure()
    name = await bank(shards.peers[front].shard)
    cold.draining.begin(node_prefix(front))

    topology = await Directory(cluster_spec, lambda: cluster).ensure()
    assert [info.name for info in topology.taking()] == [back]
    with pytest.raises(Conflict, match=r"front is being drained .*--undo"):
        topology.taking("front")
    # its own banks stay until they are moved, others are refused whoever sends them
    await shards.peers[front].call("attach", name, "")
    await shards.peers[front].call("migrate", name, back)
    with pytest.raises(Conflict, match="is being drained"):
        await shards.peers[front].call("attach", name, back)
    with pytest.raises(Conflict, match="is being drained"):
        await shards.peers[back].call("migrate", name, front)
    assert cold.catalog.get(name).owner == back

    cold.draining.end(node_prefix(front))
    assert len((await directory.ensure()).taking()) == 2
    await shards.peers[back].call("migrate", name, front)


async def test_what_was_seen_is_remembered_until_a_caller_doubts_it(directory, cluster, shards, bank, cold):
    await directory.ensure()
    one, two = shards.start("one"), shards.start("two")
    name = await bank(one)
    assert await directory.owner(name, fresh=False) == "one"

    await two.attach(name, "one")

    assert await directory.owner(name, fresh=False) == "one"
    assert await directory.owner(name, fresh=True) == "two"
    assert await directory.owner(name, fresh=False) == "two"
    await two.detach(name)
    assert await directory.owner(name, fresh=True) is None


async def test_a_bank_that_is_not_there_is_not_found(directory):
    with pytest.raises(BankNotFound, match="no bank 'a/none'"):
        await directory.owner("a/none", fresh=False)


async def test_two_directories_agree_through_the_catalog(cluster_spec, cluster, shards, bank):
    first, second = Directory(cluster_spec, lambda: cluster), Directory(cluster_spec, lambda: cluster)
    name = await bank(shards.start("one"))

    assert await first.owner(name, fresh=False) == await second.owner(name, fresh=False) == "one"
