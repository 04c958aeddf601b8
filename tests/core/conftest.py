from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raymem
from raymem import BankSpec, Calibration, Fingerprint, KeySpec, Settings, Store, Trace
from raymem.storage.store import ColdStore


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
def cold(tmp_path: Path, calibration: Calibration) -> ColdStore:
    store = ColdStore.open(str(tmp_path / "cold"))
    store.calibrations.put(calibration.hash, calibration.model, calibration.layers, calibration.to_bytes())
    return store


@pytest.fixture
def bank_spec(tiny: Any) -> BankSpec:
    """Of a bank whose calibration `cold` has."""
    return tiny.spec("spalm")


@pytest.fixture
def make_trace(tiny: Any) -> Callable[..., Trace]:
    return tiny.trace
