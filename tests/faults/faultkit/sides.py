"""A Ray cluster whose nodes are machines of their own, each with a client that is told what to do."""

import asyncio
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faultkit.fleet import KIT, Dead, Process, Refused
from faultkit.net import Net

HEAD = "left"
_PORT = 6399
# what is lost and not refused Ray misses after so many tries, each of which may take so long
_RAY = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}


class Sides:
    """Nodes and clients by the name of their machine.

    Args:
        net: the machines.
        folder: for what clients say.
        uri: of the store.
        lease_s: of the shards.
        mutation: put into every process that Ray starts, see `mutations`.
    """

    def __init__(self, net: Net, folder: Path, uri: str, lease_s: float, mutation: str) -> None:
        self.net = net
        self._folder = folder
        self._client = ["-m", "faultkit.side", uri, str(lease_s)]
        self._address = f"{net.addresses[HEAD]}:{_PORT}"
        # said outright: left to itself Ray makes the head ask for the token that this user happens to have, and has a
        # node that joins bring none
        self._ray = _RAY | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._variables = self._ray | {"FAULTS_MUTATION": mutation}
        self._clients: dict[str, Process] = {}

    async def start(self, names: Sequence[str]) -> None:
        """The nodes, the first of which is the head, and a client on each."""
        starting = [self._start_client(name) for name in names]
        clients = asyncio.gather(*starting)
        for name in names:
            await self._start_node(name)
        self._clients = dict(zip(names, await clients, strict=True))

    async def renew(self, name: str) -> None:
        """An empty machine in the place of one, with a node and a client that knows the store."""
        self.net.add(name)
        client, _ = await asyncio.gather(self._start_client(name), self._start_node(name))
        await client.ask("connect", name)
        old, self._clients[name] = self._clients[name], client
        await old.end()

    async def close(self) -> None:
        """End the machines, with nodes and clients."""
        for name, client in self._clients.items():
            # a client is a process behind the one that we started
            self.net.machines[name].close()
            await client.end()

    def ask(self, side: str, *command: Any) -> "asyncio.Future[Any]":
        """Tell a client to do something, see `Side`."""
        return self._clients[side].ask(*command)

    async def answers(self, side: str, *command: Any) -> bool:
        """Whether a client does it without an error."""
        try:
            await self.ask(side, *command)
        except (Refused, Dead):
            return False
        return True

    def pids(self, side: str, named: str) -> list[int]:
        """As `Machine.pids`."""
        return self.net.machines[side].pids(named)

    async def lead(self, side: str) -> None:
        """Start the directory on a side; Ray takes that for a wish."""
        for _ in range(10):
            await self.ask(side, "lead")
            if self.pids(side, "ray::DirectoryActor"):
                return
        raise RuntimeError(f"Ray never starts the directory on {side}")

    async def _start_client(self, name: str) -> Process:
        command = self.net.machines[name].command(sys.executable, *self._client)
        log = self._folder / f"{name}.log"
        client = await Process.start(command, log, self._ray | {"RAY_ADDRESS": self._address})
        await client.ready.wait()
        return client

    async def _start_node(self, name: str) -> None:
        where = ["--head", f"--port={_PORT}", "--include-dashboard=false", "--no-monitor"]
        if name != HEAD:
            where = [f"--address={self._address}"]
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", f"--labels=raymem-node={name}"]
        start += [f"--node-ip-address={self.net.addresses[name]}", "--object-store-memory=100000000", *where]
        start += ["--include-log-monitor=false"]
        path = os.pathsep.join([str(KIT / "site"), str(KIT), str(KIT.parents[1]), os.environ.get("PYTHONPATH", "")])
        with (self._folder / f"{name}.log").open("a") as log:
            command = self.net.machines[name].command(*start)
            variables = os.environ | self._variables | {"PYTHONPATH": path}
            started = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=variables)
            if await started.wait():
                raise RuntimeError(f"no Ray node on {name}: {Path(log.name).read_text()[-4000:]}")
