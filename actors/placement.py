"""Which nodes and shards there are, and which shard a bank is placed on: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymem.errors import BackendUnavailable, Conflict, InvalidInput, RaymemError
from raymem.storage.catalog import part_of, part_prefix

_PREFIX = 12


@dataclass(frozen=True)
class Node:
    """A living Ray node: its id, its name for people, and its GPUs."""

    id: str
    name: str
    gpus: float = 0.0


@dataclass(frozen=True)
class RunningShard:
    """A shard actor that serves: its name, its node, and whether it has a GPU."""

    name: str
    node: Node
    gpu: bool = False


@dataclass(frozen=True)
class Topology:
    """The shards that serve, why other nodes have none, and the nodes that take no new banks."""

    shards: tuple[RunningShard, ...] = ()
    failures: Mapping[str, RaymemError] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that have a shard."""
        return sorted({shard.node.name for shard in self.shards})

    def node_of(self, shard: str) -> str | None:
        """The node that a shard is on, if it is known."""
        return next((info.node.name for info in self.shards if info.name == shard), None)

    def on(self, node: str) -> list[RunningShard]:
        """The shards of a node, by its name or the beginning of its Ray id.

        Raises:
            InvalidInput: there is no such node, naming those there are.
            RaymemError: the node is there and can't have a shard.
        """
        if node in self.failures:
            raise self.failures[node]
        found = [info for info in self.shards if info.node.name == node] or [
            info for info in self.shards if len(node) >= _PREFIX and info.node.id.startswith(node)
        ]
        if not found:
            raise InvalidInput(f"there is no node {node!r}; the nodes are {', '.join(self.nodes)}")
        return found

    def taking(self, node: str | None = None) -> list[RunningShard]:
        """The shards that take new banks: of all nodes, or of one.

        Raises:
            Conflict: they are being drained. As `on`.
        """
        found = self.shards if node is None else self.on(node)
        taking = [info for info in found if not self.is_draining(info.name)]
        if found and not taking:
            raise draining(", ".join(sorted({info.node.name for info in found})))
        return taking

    def is_draining(self, shard: str) -> bool:
        """Whether a shard is being emptied."""
        return node_prefix(shard) in self.draining


def draining(node: str) -> Conflict:
    """The error where a bank would have to go to a node that is being emptied."""
    return Conflict(f"{node} is being drained and takes no banks; end that: `raymem shard drain NODE --undo`")


def shard_name(node_id: str, index: int) -> str:
    """The name of a node's shard number `index`, as Ray and the catalog know it."""
    return f"shard-{node_id[:_PREFIX]}-{index}"


def node_prefix(shard: str) -> str:
    """The beginning of the id of the node that a shard is pinned to; "" if this is no shard's name."""
    parts = shard.split("-")
    return parts[1] if len(parts) == 3 and parts[0] == "shard" else ""


def name_nodes(raw: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Living nodes from what `ray.nodes()` says, each with a name of its own.

    A node is called by its label `raymem-node`, else by Ray's name for it (an address unless it was given one), else,
    where several share that, by the beginning of its id.
    """
    alive = [node for node in raw if node["Alive"]]
    wanted = [node.get("Labels", {}).get("raymem-node") or node["NodeName"] for node in alive]
    taken = Counter(wanted)
    return [
        Node(
            id=node["NodeID"],
            name=name if taken[name] == 1 else node["NodeID"][:_PREFIX],
            gpus=float(node.get("Resources", {}).get("GPU", 0.0)),
        )
        for node, name in zip(alive, wanted, strict=True)
    ]


def choose(
    bank: str,
    candidates: Sequence[RunningShard],
    loads: Mapping[str, dict[str, int] | RaymemError],
    *,
    prefer_gpu: bool,
) -> RunningShard:
    """The shard with the fewest bytes, then the fewest banks, among those that answered.

    A partition goes where the fewest others of its bank are, whatever else is there.

    Args:
        bank: the bank to place.
        candidates: shards that may take the bank.
        loads: for each shard, bytes of its banks, or why it did not answer.
        prefer_gpu: take one with a GPU if there is any; otherwise one without, if there is any.

    Raises:
        BackendUnavailable: none of them answers.
    """
    answering = [(info, load) for info in candidates if isinstance(load := loads[info.name], dict)]
    if not answering:
        reasons = "; ".join(str(loads[info.name]) for info in candidates) or "there are none"
        raise BackendUnavailable(f"no shard can take the bank: {reasons}")
    fitting = [pair for pair in answering if pair[0].gpu == prefer_gpu] or answering
    part = part_of(bank)
    beside = part_prefix(part[0]) if part else None

    def order(pair: tuple[RunningShard, dict[str, int]]) -> tuple[int, int, int, str]:
        info, load = pair
        others = 0 if beside is None else sum(name.startswith(beside) for name in load.keys() - {bank})
        return others, sum(load.values()), len(load), info.name

    return min(fitting, key=order)[0]
