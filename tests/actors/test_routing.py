import asyncio
from typing import Any

from raymem.actors.placement import Node, RunningShard, Topology
from raymem.actors.routing import Router
from raymem.config import ActorSettings

KNOWN = Topology((RunningShard("shard-a-0", Node("a", "a")),))


class Directory:
    """One that answers, until it is cut off from the cluster and waits for Ray."""

    name = "directory"

    def __init__(self) -> None:
        self.cut = False

    async def call(self, method: str, *args: Any) -> Any:
        if self.cut:
            await asyncio.Event().wait()
        return KNOWN


async def test_a_directory_that_is_cut_off_keeps_nobody_waiting_for_what_is_known_already(cold):
    directory = Directory()
    router = Router(cold, directory, ActorSettings(retry_s=0.2))
    await router.refresh()
    directory.cut = True

    async with asyncio.timeout(10):
        assert (await router.refresh()).shards == KNOWN.shards
