"""A gateway for fuzzers."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from raymem import BankSpec, KeySpec, Settings, connect
from raymem.config import GatewaySettings


@pytest.fixture(scope="session")
def fuzzed(run_gateway: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[str]:
    """A gateway with the bank that OpenAPI's examples name; no model, so that none is loaded."""
    gateway = GatewaySettings(model="no-such-model", max_body_bytes=2**20)
    with run_gateway(tmp_path_factory.mktemp("fuzzed") / "memory", Settings(gateway=gateway)) as url:
        with connect(url) as store:
            store.put_calibration(tiny.calibration)
            spec = BankSpec(kind="spalm", fingerprint=tiny.fingerprint, key=KeySpec(layers=(5,)))
            store.create("research/alice", spec).write(tiny.trace(20))
        # what reads text is imported once, which takes seconds
        assert httpx.post(f"{url}/v1/banks/research/alice/recall", json={"text": "x"}, timeout=200).status_code == 404
        yield url
