from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest

import raymem
from raymem import Settings, Store
from raymem.actors.cluster import LocalNodes
from raymem.config import ColdSettings

# a commit that waits for the disk is the cold room's to test
SETTINGS = Settings(cold=ColdSettings(sync="none"))


@pytest.fixture(scope="module")
def store_on(
    nodes: LocalNodes, run_gateway: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Store]]:
    """The same class three times: in this process, on a cluster of two Ray nodes, through a gateway."""
    folder = tmp_path_factory.mktemp("congruence")
    with ExitStack() as stack:

        @cache
        def open_on(backend: str) -> Store:
            address, cold = str(folder / "local"), None
            if backend == "ray":
                address, cold = "ray", str(folder / "ray")
            elif backend == "http":
                address = stack.enter_context(run_gateway(folder / "http", SETTINGS))
            return stack.enter_context(raymem.connect(address, cold=cold, settings=SETTINGS))

        yield open_on
