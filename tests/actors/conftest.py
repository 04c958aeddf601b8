import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from raymem import Settings
from raymem.actors.shard import ClusterSpec, Shard
from raymem.config import HostSettings
from raymem.errors import BackendUnavailable
from raymem.storage.store import ColdStore


class Direct:
    """Another shard, called without Ray between."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        # a method's name here fails as a dead actor would, "before" it ran or "after", or is "silent" as a stopped one
        self.dies: dict[str, str] = {}

    @property
    def name(self) -> str:
        return self.shard.name

    async def call(self, method: str, *args: Any) -> Any:
        when = self.dies.get(method)
        if when == "silent":
            await asyncio.Event().wait()
        if when == "before":
            raise BackendUnavailable(f"{self.shard.name} does not answer", shard=self.shard.name, gone=False)
        answer = await getattr(self.shard, method)(*args)
        if when == "after":
            raise BackendUnavailable(f"{self.shard.name} does not answer", shard=self.shard.name, gone=False)
        return answer


class Shards:
    """Shards of one process over one cold store, by name."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.peers: dict[str, Direct] = {}

    def start(self, name: str) -> Shard:
        """A new incarnation under this name; an older one is forgotten, as a killed process would be."""
        shard = Shard(name, self.spec, "cpu", self.peers.__getitem__)
        self.peers[name] = Direct(shard)
        return shard


@pytest.fixture
def cold(tmp_path: Path, tiny) -> ColdStore:
    store = ColdStore.open(str(tmp_path / "memory"), "none")
    calibration = tiny.calibration
    store.calibrations.put(calibration.hash, calibration.model, calibration.layers, calibration.to_bytes())
    return store


@pytest.fixture
def lease_s() -> float:
    return 9.0


@pytest.fixture
def cluster_spec(cold: ColdStore, lease_s: float) -> ClusterSpec:
    return ClusterSpec(cold.uri, "none", cold.nonce(), Settings(host=HostSettings(lease_s=lease_s)))


@pytest.fixture
async def shards(cluster_spec: ClusterSpec) -> AsyncIterator[Shards]:
    made = Shards(cluster_spec)
    yield made
    # the loop ends with the test: what its workers still do must not outlive it
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def bank(cold: ColdStore, tiny) -> Callable[..., Any]:
    """Makes a bank that is hot on a shard, with rows written; returns its name."""

    async def make(shard: Shard, name: str = "a/b", kind: str = "spalm", rows: int = 50) -> str:
        from raymem.actors.transfer import pack_fields

        cold.catalog.create(name, tiny.spec(kind))
        await shard.attach(name, "")
        await shard.write(name, pack_fields(tiny.trace(rows)), True, "")
        return name

    return make
