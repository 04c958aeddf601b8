import pytest

from raymem.actors.placement import Node, RunningShard, Topology, choose, name_nodes, node_prefix, shard_name
from raymem.errors import BackendUnavailable, InvalidInput, NotShared

ONE, TWO = Node("a" * 56, "one"), Node("b" * 56, "two", gpus=1)
CPU, OTHER, GPU = (
    RunningShard("shard-a-0", ONE),
    RunningShard("shard-a-1", ONE),
    RunningShard("shard-b-0", TWO, gpu=True),
)
DOWN = BackendUnavailable("no answer")


def raw(node_id: str, name: str, alive: bool = True, **labels: str) -> dict[str, object]:
    named = {key.replace("_", "-"): value for key, value in labels.items()}
    return {"NodeID": node_id, "NodeName": name, "Alive": alive, "Labels": named, "Resources": {"GPU": 2.0}}


def test_nodes_are_called_by_label_then_by_rays_name_then_by_id():
    nodes = name_nodes(
        [
            raw("1" * 56, "10.0.0.1", raymem_node="front"),
            raw("2" * 56, "10.0.0.2"),
            raw("3" * 56, "10.0.0.3"),
            raw("4" * 56, "10.0.0.3"),
            raw("5" * 56, "10.0.0.2", alive=False),
        ]
    )

    assert [node.name for node in nodes] == ["front", "10.0.0.2", "3" * 12, "4" * 12]
    assert nodes[0].gpus == 2.0


def test_a_shards_name_tells_its_node():
    name = shard_name(ONE.id, 3)

    assert ONE.id.startswith(node_prefix(name))
    assert node_prefix("process 12 since 3.4 on host as 1234") == ""


def test_a_node_is_found_by_name_and_by_id():
    topology = Topology((CPU, OTHER, GPU))

    assert topology.nodes == ["one", "two"]
    assert topology.on("one") == [CPU, OTHER]
    assert topology.on(TWO.id[:16]) == [GPU]
    assert topology.node_of("shard-b-0") == "two"
    assert topology.node_of("process 12") is None


def test_an_unknown_node_is_refused_naming_the_others():
    with pytest.raises(InvalidInput, match=r"no node 'three'; the nodes are one, two"):
        Topology((CPU, GPU)).on("three")


def test_a_node_without_a_shard_says_why():
    topology = Topology((CPU,), {"two": NotShared("two sees no cold store")})

    with pytest.raises(NotShared, match="two sees no cold store"):
        topology.on("two")


@pytest.mark.parametrize(
    ("loads", "prefer_gpu", "expected"),
    [
        ({"shard-a-0": {"x": 9}, "shard-a-1": {"y": 5}, "shard-b-0": {}}, False, OTHER),
        ({"shard-a-0": {"x": 9}, "shard-a-1": {"y": 5}, "shard-b-0": {"z": 99}}, True, GPU),
        ({"shard-a-0": {"x": 0}, "shard-a-1": {}, "shard-b-0": {}}, False, OTHER),
        ({"shard-a-0": {}, "shard-a-1": {}, "shard-b-0": {}}, False, CPU),
        ({"shard-a-0": {"x": 9}, "shard-a-1": DOWN, "shard-b-0": {}}, False, CPU),
        ({"shard-a-0": DOWN, "shard-a-1": DOWN, "shard-b-0": {"z": 99}}, False, GPU),
        ({"shard-a-0": {"x": 9}, "shard-a-1": {}, "shard-b-0": DOWN}, True, OTHER),
    ],
    ids=["fewest bytes", "GPU asked for", "fewest banks", "by name", "silent", "all else silent", "GPU silent"],
)
def test_a_bank_goes_where_there_is_room(loads, prefer_gpu, expected):
    assert choose("lab/a", [CPU, OTHER, GPU], loads, prefer_gpu=prefer_gpu) == expected


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ({"shard-a-0": {"lab/a.p0": 0, "lab/a.p1": 0}, "shard-a-1": {"lab/a.p3": 9}}, OTHER),
        ({"shard-a-0": {"lab/a.p0": 0}, "shard-a-1": {"lab/a.p3": 9}}, CPU),
        ({"shard-a-0": {"lab/a.p2": 99}, "shard-a-1": {"lab/a.p3": 1}}, CPU),
        ({"shard-a-0": {"lab/a.p0": 0}, "shard-a-1": {"lab/ab.p1": 9, "lab/x": 9}}, OTHER),
    ],
    ids=["fewest others", "as many others", "itself", "another bank's"],
)
def test_a_partition_goes_where_the_fewest_others_are(loads, expected):
    assert choose("lab/a.p2", [CPU, OTHER], loads, prefer_gpu=False) == expected


def test_when_no_shard_answers_the_reasons_are_given():
    with pytest.raises(BackendUnavailable, match="no answer"):
        choose("lab/a", [CPU], {"shard-a-0": DOWN}, prefer_gpu=False)
