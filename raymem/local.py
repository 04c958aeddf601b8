"""The backend for one process: a folder with the cold store, a host with the hot banks."""

from __future__ import annotations

import re
import socket
import uuid
from typing import Any

import psutil
from torch import Tensor

from raymem.backend import ColdBackend, detached
from raymem.cold.store import ColdStore
from raymem.config import Settings
from raymem.errors import Conflict, InvalidInput, Moved
from raymem.host import Host
from raymem.types import Ack, BankInfo, MigrationReport, Readout, Trace

NODE = "local"
_OWNER = re.compile(r"process (?P<pid>\d+) since (?P<since>[\d.]+) on (?P<host>\S+) as \w+")


class LocalBackend(ColdBackend):
    """Banks in this process.

    A bank that another living process on this machine holds is refused; one whose process has died is taken over.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        super().__init__(ColdStore.open(uri, settings.cold.sync))
        self.host = Host(self.cold, settings, owner=_this_process())

    async def attach(self, name: str, node: str | None) -> BankInfo:
        """Load a bank into this process."""
        _check_node(node)
        if not self.host.has(name):
            self._check_free(name, take=True)
            await self.host.attach(name)
        return await self.info(name)

    async def detach(self, name: str) -> BankInfo:
        """Settle, snapshot, free."""
        await self._ensure(name)
        await self.host.detach(name)
        return await self.info(name)

    async def write(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Journal and apply a trace."""
        await self._ensure(name)
        try:
            return await self.host.write(name, trace, durable=durable)
        except Moved:
            # the worker was lost and dropped: the catalog says who has the bank now
            await self._ensure(name)
            return await self.host.write(name, trace, durable=durable)

    async def read(self, name: str, hidden_QLD: Tensor, k: int, start: int) -> Readout:
        """Read a bank."""
        await self._ensure(name)
        return await self.host.read(name, hidden_QLD, k, start)

    async def migrate(self, name: str, to: str) -> MigrationReport:
        """There is one node here: a move to it moves nothing."""
        _check_node(to)
        await self._ensure(name)
        return MigrationReport(name, NODE, NODE, rows=0, pause_ms=0.0, total_ms=0.0)

    async def digest(self, name: str) -> str:
        """sha256 of the bank's state."""
        await self._ensure(name)
        return await self.host.digest(name)

    async def nodes(self) -> list[str]:
        """This process."""
        return [NODE]

    async def stats(self) -> dict[str, Any]:
        """The host's counters, as those of the only shard."""
        return {"backend": "local", "cold": self.cold.uri, "sync": self.cold.sync, "shards": [await self.host.stats()]}

    async def close(self) -> None:
        """Settle every bank."""
        await self.host.close()

    async def hot_bytes(self) -> dict[str, int]:
        """Bytes of each hot bank here."""
        return self.host.bytes()

    def node_of(self, owner: str) -> str | None:
        """All owners of a local store are processes of this machine."""
        return NODE

    async def _ensure(self, name: str) -> None:
        if self.host.has(name):
            return
        if self.cold.catalog.get(name).state == "cold":
            raise detached(name)
        self._check_free(name, take=False)
        await self.host.attach(name)

    def _check_free(self, name: str, *, take: bool) -> None:
        owner = self.cold.catalog.get(name).owner
        if owner and not take and not _OWNER.fullmatch(owner):
            raise Conflict(
                f'bank {name!r} is hot on {owner} of a Ray cluster: raymem.connect("ray"); if that cluster is gone, '
                f"take the bank: bank.attach() or `raymem bank attach {name}`",
                owner=owner,
            )
        if owner and owner != self.host.owner and alive(owner):
            raise Conflict(
                f"bank {name!r} is held by {owner}; close it there, or share it: "
                "`raymem serve` and connect to its http:// address",
                owner=owner,
            )


def _check_node(node: str | None) -> None:
    if node not in (None, NODE):
        raise InvalidInput(f"there is no node {node!r} in a local store; its only node is {NODE!r}")


def _this_process() -> str:
    process = psutil.Process()
    # the last word tells two stores of one process apart
    return (
        f"process {process.pid} since {process.create_time():.2f} on {socket.gethostname()} as {uuid.uuid4().hex[:8]}"
    )


def alive(owner: str) -> bool:
    """Whether `owner`, as the catalog names it, is a living process on this machine."""
    found = _OWNER.fullmatch(owner)
    if found is None or found["host"] != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(found['pid'])).create_time():.2f}" == found["since"]
    except psutil.NoSuchProcess:
        return False
