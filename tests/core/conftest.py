from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raymem
from raymem import BankSpec, Calibration, Fingerprint, KeySpec, Settings, Store, Trace


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
def settings() -> Settings:
    return Settings.load()


@pytest.fixture
def store(tmp_path: Path, calibration: Calibration, settings: Settings) -> Iterator[Store]:
    with raymem.connect(tmp_path / "memory", settings=settings) as opened:
        opened.put_calibration(calibration)
        yield opened


@pytest.fixture
def make_trace(tiny: Any) -> Callable[..., Trace]:
    return tiny.trace
