import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest
import uvicorn

import raymem
from raymem import AsyncStore, Settings, Store
from raymem.actors.cluster import local_nodes
from raymem.config import ColdSettings
from raymem.serving.app import create_app
from raymem.serving.server import address, bind

# a commit that waits for the disk is the cold room's to test
SETTINGS = Settings(cold=ColdSettings(sync="none"))


@contextmanager
def _gateway(folder: Path) -> Iterator[str]:
    async def opener() -> AsyncStore:
        return await AsyncStore.connect(folder, settings=SETTINGS)

    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(opener, SETTINGS), log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the gateway did not start"
            time.sleep(0.01)
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def store_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Store]]:
    """The same class three times: in this process, on a cluster of two Ray nodes, through a gateway."""
    folder = tmp_path_factory.mktemp("congruence")
    with ExitStack() as stack:

        @cache
        def open_on(backend: str) -> Store:
            address, cold = str(folder / "local"), None
            if backend == "ray":
                stack.enter_context(local_nodes(2, cpus=1))
                address, cold = "ray", str(folder / "ray")
            elif backend == "http":
                address = stack.enter_context(_gateway(folder / "http"))
            return stack.enter_context(raymem.connect(address, cold=cold, settings=SETTINGS))

        yield open_on
