"""A client of the Ray cluster that RAY_ADDRESS names, on a machine of its own and told what to do by JSON lines."""

import asyncio
import sys
from typing import Any

import ray
from faultkit import made
from faultkit.commands import Run, serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymem import AsyncStore, Settings
from raymem.actors import cluster
from raymem.actors.calls import Remote, ask
from raymem.actors.shard import ClusterSpec
from raymem.actors.transfer import pack, pack_fields
from raymem.config import ActorSettings, ColdSettings, HostSettings
from raymem.storage.store import ColdStore

# a client whose calls end soon, so that it is seen what they end with
RETRY_S = 5.0


class Side:
    """Runs commands against the cluster's store, through the node that is on this machine."""

    def __init__(self, uri: str, lease_s: float) -> None:
        self._uri = uri
        self._settings = Settings(
            cold=ColdSettings(snapshot_bytes=8192),
            host=HostSettings(lease_s=lease_s),
            actors=ActorSettings(retry_s=40.0),
        )
        self._store: AsyncStore
        # found before the cut: who looks an actor up asks Ray's head
        self._shard: Remote
        self._directory = Remote(cluster.DIRECTORY)

    async def run(self, method: str, *args: Any) -> Any:
        """One command; its answer as JSON data."""
        return await getattr(self, method)(*args)

    async def lead(self) -> None:
        """Start the directory, here if Ray will; it may go elsewhere once this node is dead."""
        await asyncio.to_thread(cluster.join, "ray")
        await asyncio.to_thread(cluster._kill, cluster.DIRECTORY)
        store = ColdStore.open(self._uri)
        spec = ClusterSpec(store.uri, store.sync, store.nonce(), self._settings)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = cluster._lifetime | {"name": cluster.DIRECTORY, "num_cpus": 0, "scheduling_strategy": here}
        ray.remote(cluster.DirectoryActor).options(**options).remote(spec)
        await Remote(cluster.DIRECTORY).call("spec")

    async def connect(self, node: str) -> None:
        """Open the store, and know the shard of a node."""
        brief = self._settings.model_copy(update={"actors": ActorSettings(retry_s=RETRY_S)})
        self._store = await AsyncStore.connect("ray", cold=self._uri, settings=brief)
        router = self._store.backend._router
        self._shard = router.remote(router.topology.on(node)[0].name)
        await self._shard.call("bytes")

    async def create(self, bank: str, kind: str, node: str) -> None:
        """A bank that is hot on a node."""
        handle = await self._store.create(bank, made.spec(kind))
        await handle.migrate(node)

    async def directory(self, bank: str, fresh: bool) -> str | None:
        """The directory's answer to where a bank is."""
        answer: str | None = await ask(self._directory, "owner", bank, fresh, timeout_s=RETRY_S)
        return answer

    async def write(self, bank: str, stream: str, run: str, seq: int, rows: int) -> None:
        """Rows of a run that follow from its name."""
        await self._store.bank(bank).write(made.trace(stream, run, seq, rows))

    async def read(self, bank: str) -> int:
        """What the store says to some states; how many of them it answered."""
        return len((await self._store.bank(bank).read(made.trace("asks", "run", 0, 3).hidden)).relevance_Q)

    async def look(self, bank: str) -> None:
        """Read at the shard of this side and nowhere else, whoever owns the bank by now."""
        hidden = pack(made.trace("asks", "run", 0, 3).hidden)
        await ask(self._shard, "read", bank, hidden, 3, 1, "", timeout_s=RETRY_S)

    async def press(self, bank: str, stream: str, run: str, seq: int, rows: int) -> None:
        """As `write`, at the shard of this side and nowhere else."""
        fields = pack_fields(made.trace(stream, run, seq, rows))
        await ask(self._shard, "write", bank, fields, True, "", timeout_s=RETRY_S)

    async def attach(self, bank: str) -> None:
        """Ask for a bank where there are fewest bytes."""
        await self._store.bank(bank).attach()

    async def nodes(self) -> list[str]:
        """The nodes that have a shard, as far as is known."""
        return await self._store.nodes()

    async def digest(self, bank: str) -> str:
        """As `AsyncBank.digest`."""
        return await self._store.bank(bank).digest()


async def main(uri: str, lease: str) -> None:
    """Serve until stdin ends."""

    async def begin() -> Run:
        return Side(uri, float(lease)).run

    await serve(begin)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
