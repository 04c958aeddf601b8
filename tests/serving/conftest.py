import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from raymem import AsyncStore, BankSpec, Calibration, Fingerprint, KeySpec, Settings, Trace, connect
from raymem.encode.calibration import Range
from raymem.serving.app import create_app
from raymem.serving.server import address, bind

WIDTH = 24
LONGEST_RUN = 1000


@pytest.fixture(scope="session")
def gateway_calibration() -> Calibration:
    """Statistics of the tiny model."""
    ranges = {KeySpec(layers=(layer,)): Range(0.2, 0.95) for layer in (3, 5)}
    return Calibration(model="content", layers=(3, 5), mean_LD=torch.full((2, WIDTH), 0.5), ranges=ranges)


@pytest.fixture(scope="session")
def gateway_fingerprint() -> Fingerprint:
    """Small states of two layers, of a model that does not exist."""
    return Fingerprint(model="tiny", content="content", layers=(3, 5), width=WIDTH, tokenizer="tokens")


@pytest.fixture(scope="session")
def gateway_spec(gateway_fingerprint: Fingerprint) -> BankSpec:
    return BankSpec(kind="spalm", fingerprint=gateway_fingerprint, key=KeySpec(layers=(5,)))


@pytest.fixture(scope="session")
def make_rows():
    """Traces of random states: the same run, seq and seed give the same rows, however they are cut."""

    def make(rows: int = 20, *, stream: str = "s", run: str = "r", seq: int = 0, seed: int = 0) -> Trace:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(LONGEST_RUN, 2, WIDTH, generator=generator) + 0.5
        tokens = torch.randint(0, 50, (LONGEST_RUN,), generator=generator)
        piece = slice(seq, seq + rows)
        return Trace(hidden[piece].bfloat16(), tokens[piece], stream, run, seq, time=1.0)

    return make


@contextmanager
def _running(folder: Path, settings: Settings, wrap: Callable[[Any], Any] = lambda app: app) -> Iterator[str]:
    async def opener() -> AsyncStore:
        return await AsyncStore.connect(folder, settings=settings)

    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(wrap(create_app(opener, settings)), log_level="warning"))
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


@pytest.fixture(scope="session")
def run_gateway() -> Callable[..., object]:
    """A context manager: a real gateway over a real local store on a loopback port; gives its address."""
    return _running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, gateway_calibration: Calibration) -> Iterator[str]:
    """The address of a gateway over a store that has the tiny model's calibration."""
    settings = Settings()
    with _running(tmp_path_factory.mktemp("gateway") / "memory", settings) as url:
        with connect(url) as store:
            store.put_calibration(gateway_calibration)
        yield url


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with bind("127.0.0.1", 0) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def bank_name(request: pytest.FixtureRequest) -> str:
    """A bank of this test alone."""
    return f"lab/{abs(hash(request.node.name)):x}"
