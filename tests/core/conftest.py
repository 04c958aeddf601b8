from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raymem
from raymem import BankSpec, Calibration, Fingerprint, KeySpec, Store, Trace


@pytest.fixture
def calibration(tiny: Any) -> Calibration:
    return tiny.calibration


@pytest.fixture
def fingerprint(tiny: Any) -> Fingerprint:
    return tiny.fingerprint


@pytest.fixture
def spec(fingerprint: Fingerprint) -> BankSpec:
    return BankSpec(kind="spalm", fingerprint=fingerprint, key=KeySpec(layers=(5,)))


@pytest.fixture
def store(tmp_path: Path, calibration: Calibration) -> Iterator[Store]:
    with raymem.connect(tmp_path / "memory") as opened:
        opened.put_calibration(calibration)
        yield opened


@pytest.fixture
def make_trace(tiny: Any) -> Callable[..., Trace]:
    return tiny.trace
