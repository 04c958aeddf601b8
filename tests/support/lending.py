"""What takes long to start and is started once in a run: Ray nodes and a vLLM engine, lent to one file at a time."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from spreading import SHARED, file_of


class Lender:
    """Keeps what was started until a file comes that doesn't share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, tuple[Any, ExitStack]] = {}

    def cluster(self) -> Any:
        """Two Ray nodes without raymem on them."""
        from raymem.actors.cluster import local_nodes

        if "cluster" in self._running and self._running["cluster"][0].names != ["node-1", "node-2"]:
            self.close("cluster")
        return self._start("cluster", lambda stack: stack.enter_context(local_nodes(2, cpus=1)))

    def engine(self) -> Any:
        """An engine that serves."""
        from shared_engine import started

        if "engine" in self._running and self._running["engine"][0].stopped:
            self.close("engine")
        return self._start("engine", lambda stack: stack.enter_context(started(self._folder)))

    def _start(self, name: str, start: Any) -> Any:
        if name not in self._running:
            stack = ExitStack()
            self._running[name] = start(stack), stack
        return self._running[name][0]

    def close(self, name: str) -> None:
        """End one of them, if it runs."""
        if name in self._running:
            self._running.pop(name)[1].close()


@pytest.fixture(scope="session")
def lender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lender]:
    made = Lender(tmp_path_factory.mktemp("lent"))
    yield made
    for name in SHARED:
        made.close(name)


@pytest.fixture(scope="module", autouse=True)
def _nothing_else_runs(request: pytest.FixtureRequest, lender: Lender) -> None:
    # a cluster or an engine of a file's own is alone in the process, and no other file waits for the memory
    for name, files in SHARED.items():
        if file_of(request.node.nodeid) not in files:
            lender.close(name)


@pytest.fixture(scope="module")
def nodes(lender: Lender) -> Iterator[Any]:
    """Two Ray nodes, node-1 and node-2; a file that changes them is the last one of its group."""
    from raymem.actors import cluster

    yield lender.cluster()
    # another file has another store
    asyncio.run(cluster.stop())


@pytest.fixture(scope="module")
def engine(lender: Lender) -> Any:
    """The engine, see `shared_engine`."""
    return lender.engine()
