"""raymem's actors on a Ray cluster: joining it, starting shards and the directory, ending them.

The one place that makes actors; everything they are made of is plain classes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
import torch
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymem.actors.calls import NAMESPACE, Remote, ask_all
from raymem.actors.directory import Directory
from raymem.actors.placement import Node, RunningShard, name_nodes, node_prefix, shard_name
from raymem.actors.shard import ClusterSpec, Shard
from raymem.errors import BackendUnavailable, ConfigError, Unavailable

DIRECTORY = "directory"
# calls that one actor runs at a time; beyond each caller's own limit Ray would queue them silently
_CONCURRENT = 4096
_CONNECT_S = 5.0
_lifetime: dict[str, Any] = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "max_restarts": -1,
    # a call that died with its actor may have run; only the caller knows whether it can be repeated
    "max_task_retries": 0,
    "max_concurrency": _CONCURRENT,
}
# for nodes on this machine: quiet, at normal priority, and soon missed when they are gone
_LOCAL = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_worker_niceness": "0",
}
# processes that show a cluster, resize it and repeat what its workers say: each imports for seconds as a node starts
_LEFT_OUT = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
_joining = threading.Lock()
_users = 0
_ours = False
_inherited = False


def _after_fork() -> None:
    """Reset in a forked child, which has none of its parent's threads and may have a lock that one of them held."""
    global _joining, _users, _ours, _inherited
    _joining, _users, _ours = threading.Lock(), 0, False
    _inherited = ray.is_initialized()


os.register_at_fork(after_in_child=_after_fork)


def join(address: str) -> None:
    """Connect this process to a Ray cluster, unless it is connected already; `leave` undoes it.

    Args:
        address: "ray" for the cluster that runs here or that RAY_ADDRESS names, or ray://host:port for Ray Client.

    Raises:
        BackendUnavailable: there is none.
        ConfigError: ray:// while this process is connected in another way.
    """
    global _users, _ours
    if _inherited:
        raise BackendUnavailable(
            "this process was forked from one that is connected to Ray, and can't use that: start it with "
            "multiprocessing's 'spawn'"
        )
    with _joining:
        if not ray.is_initialized():
            _connect(address)
            _ours = True
        elif address != "ray" and not ray.util.client.ray.is_connected():
            raise ConfigError(f"this process is connected to a Ray cluster already: use 'ray', not {address!r}")
        _users += 1


def leave() -> None:
    """Undo one `join`; the last one disconnects if `join` connected."""
    global _users, _ours
    with _joining:
        _users -= 1
        if _users == 0 and _ours:
            _ours = False
            ray.shutdown()


def _connect(address: str) -> None:
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    named = os.environ.get("RAY_ADDRESS", "") if address == "ray" else address
    host, _, port = named.removeprefix("ray://").rpartition(":")
    try:
        # Ray itself retries a closed port for minutes
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        ray.init(address="auto" if address == "ray" else address, **quiet)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        fix = "start one with `ray start --head`, or `raymem demo` for one of its own; RAY_ADDRESS names another"
        if address != "ray":
            fix = "check host and port (Ray Client listens on 10001) and that the cluster runs"
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise BackendUnavailable(f"no Ray cluster at {named or address!r} ({why}); {fix}") from error


class ShardActor(Shard):
    """A shard in a process of its own."""

    def __init__(self, name: str, spec: ClusterSpec, device: str) -> None:
        super().__init__(name, spec, device, Remote)
        # Ray gives an actor as many threads as it reserves CPUs, and a shard reserves almost none
        torch.set_num_threads(min(spec.settings.host.threads, len(os.sched_getaffinity(0))))
        # imported objects stay: without this the collector scanned them every second under load, 0.2 s each time
        gc.freeze()


class RayCluster:
    """What the directory asks of Ray."""

    def nodes(self) -> list[Node]:
        """The living nodes."""
        return living_nodes()

    async def start_shard(self, spec: ClusterSpec, node: Node, index: int) -> RunningShard:
        """A shard on `node` that sees the cold store, made if it isn't there yet.

        Raises:
            NotShared: the node sees another cold store, or none.
            Unavailable: it did not start in time.
        """
        actors = spec.settings.actors
        gpus = actors.gpus_per_shard if node.gpus else 0.0
        name = shard_name(node.id, index)
        options = _lifetime | {"name": name, "num_cpus": actors.cpus_per_shard, "num_gpus": gpus}
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        make = ray.remote(ShardActor).options(**options, scheduling_strategy=pinned)
        await asyncio.to_thread(make.remote, name, spec, "cuda:0" if gpus else "cpu")
        try:
            async with asyncio.timeout(actors.retry_s):
                await Remote(name).call("start")
        except TimeoutError:
            raise Unavailable(
                f"node {node.name} started no shard within {actors.retry_s:g} s: it needs {actors.cpus_per_shard:g} "
                f"CPU and {gpus:g} GPU free there (settings actors.cpus_per_shard, actors.gpus_per_shard)"
            ) from None
        return RunningShard(name, node, gpu=gpus > 0)

    async def stop_shard(self, name: str) -> None:
        """End a shard without a flush."""
        await asyncio.to_thread(_kill, name)

    async def restart_shard(self, name: str) -> None:
        """End a shard without a flush; Ray starts it again."""
        await asyncio.to_thread(_kill, name, restart=True)

    def shard(self, name: str) -> Remote:
        """A shard by its name."""
        return Remote(name)


class DirectoryActor(Directory):
    """A directory in a process of its own."""

    def __init__(self, spec: ClusterSpec) -> None:
        super().__init__(spec, RayCluster)
        # after a restart, nodes and leases are watched even if no call comes
        ray.get_runtime_context().current_actor.ensure.remote(False)


def start_directory(spec: ClusterSpec) -> Remote:
    """The cluster's directory, made if it isn't there yet; of two that start at once, the first one's spec holds."""
    ray.remote(DirectoryActor).options(**_lifetime, name=DIRECTORY, num_cpus=0).remote(spec)
    return Remote(DIRECTORY)


def living_nodes() -> list[Node]:
    """The living nodes of the cluster, each with a name of its own.

    Raises:
        BackendUnavailable: the cluster does not answer.
    """
    try:
        return name_nodes(ray.nodes())
    except (RayError, ConnectionError) as error:
        raise BackendUnavailable(f"the Ray cluster does not answer: {error}") from error


class Head:
    """Ray's head, which knows the nodes. A process that is cut off from it waits in Ray, so one call at a time is made.

    Args:
        limit_s: how long to wait for an answer.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._asked: asyncio.Future[list[Node]] | None = None

    async def has_lost(self, shard: str) -> bool:
        """Whether a shard can't come back: it is no shard of this cluster, or its node has left.

        Raises:
            BackendUnavailable: the head does not answer in time.
        """
        prefix = node_prefix(shard)
        return not prefix or not any(node.id.startswith(prefix) for node in await self._nodes())

    async def _nodes(self) -> list[Node]:
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(asyncio.to_thread(living_nodes))
        try:
            return await asyncio.wait_for(asyncio.shield(self._asked), self._limit_s)
        except TimeoutError as error:
            raise BackendUnavailable(
                f"Ray's head does not say which nodes there are, not within {self._limit_s:g} s: this node may be cut "
                "off from it"
            ) from error


async def stop() -> None:
    """End raymem on the cluster: flush every bank, then end shards and directory. Banks stay in the cold store."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
    # the directory first, as it would start the shards again
    for name in sorted(names, key=lambda name: name != DIRECTORY):
        if name == DIRECTORY:
            _kill(name)
    shards = [name for name in names if name != DIRECTORY]
    await ask_all([Remote(name) for name in shards], "close", timeout_s=60.0)
    for name in shards:
        _kill(name)


class LocalNodes:
    """Ray nodes on this machine: real ones, each with a raylet, workers and an object store of its own."""

    def __init__(self, cpus: float, object_store_bytes: int) -> None:
        # Ray's own helper for several nodes on one machine; it writes to stderr what its processes say
        from ray.cluster_utils import Cluster

        self._arguments = {"num_cpus": cpus, "object_store_memory": object_store_bytes} | _LEFT_OUT
        self._cluster: Any = Cluster()
        self._nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is set to."""
        return str(self._cluster.address)

    @property
    def names(self) -> list[str]:
        """The nodes that run."""
        return list(self._nodes)

    def add(self, name: str) -> None:
        """Start a node called `name`."""
        with warnings.catch_warnings():
            # Ray forks to start its processes, which then run other programs: LanceDB is not used in between
            warnings.filterwarnings("ignore", "lance(db fork support| is not fork-safe)")
            self._nodes[name] = self._cluster.add_node(**self._arguments, labels={"raymem-node": name})

    def raylet(self, name: str) -> int:
        """The process id of a node's raylet, whose children are the node's workers."""
        raylets: list[Any] = self._nodes[name].all_processes[PROCESS_TYPE_RAYLET]
        return int(raylets[0].process.pid)

    def kill(self, name: str) -> None:
        """End a node without warning, with everything that runs on it."""
        # workers outlive their raylet for a while
        workers = psutil.Process(self.raylet(name)).children(recursive=True)
        node = self._nodes.pop(name)
        self._cluster.remove_node(node, allow_graceful=False)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()

    def close(self) -> None:
        """End every node."""
        self._cluster.shutdown()


@contextmanager
def local_nodes(n: int, *, cpus: float = 2, object_store_bytes: int = 200 * 2**20) -> Iterator[LocalNodes]:
    """Start `n` Ray nodes on this machine, called node-1 and so on; inside, "ray" means this cluster.

    For demos, tests and benchmarks. On the way out raymem is ended there, then the nodes; nothing else is touched.

    Raises:
        ConfigError: this process is connected to a Ray cluster already.
    """
    if ray.is_initialized():
        raise ConfigError("this process is connected to a Ray cluster already: ray.shutdown() first")
    saved = {name: os.environ.get(name) for name in [*_LOCAL, "RAY_ADDRESS"]}
    os.environ.update(_LOCAL)
    os.environ.pop("RAY_ADDRESS", None)
    nodes = LocalNodes(cpus, object_store_bytes)
    try:
        for index in range(n):
            nodes.add(f"node-{index + 1}")
        os.environ["RAY_ADDRESS"] = nodes.address
        join("ray")
        try:
            yield nodes
        finally:
            asyncio.run(stop())
            leave()
    finally:
        nodes.close()
        for name, value in saved.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _kill(name: str, restart: bool = False) -> None:
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=not restart)
    except ValueError:
        # it has ended already
        return
