from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raymem import BankSpec, KeySpec, Settings, Trace, connect
from raymem.serving.server import bind


@pytest.fixture(scope="session")
def gateway_spec(tiny: Any) -> BankSpec:
    return BankSpec(kind="spalm", fingerprint=tiny.fingerprint, key=KeySpec(layers=(5,)))


@pytest.fixture(scope="session")
def make_rows(tiny: Any) -> Callable[..., Trace]:
    return tiny.trace


@pytest.fixture(scope="module")
def gateway(run_gateway: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[str]:
    """The address of a gateway over a store that has the tiny model's calibration."""
    with run_gateway(tmp_path_factory.mktemp("gateway") / "memory", Settings()) as url:
        with connect(url) as store:
            store.put_calibration(tiny.calibration)
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
