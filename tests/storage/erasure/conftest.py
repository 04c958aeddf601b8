"""A blocking store whose banks are erased from, and its durable side."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import raymem
from raymem import Settings, Store
from raymem.config import ColdSettings
from raymem.storage.store import ColdStore


@pytest.fixture
def settings() -> Settings:
    """A commit that waits for the disk is another file's to test."""
    return Settings(cold=ColdSettings(sync="none", sweep_age_s=0))


@pytest.fixture
def store(tmp_path: Path, tiny, settings: Settings) -> Iterator[Store]:
    with raymem.connect(tmp_path, settings=settings) as store:
        store.put_calibration(tiny.calibration)
        yield store


@pytest.fixture
def cold(store: Store) -> ColdStore:
    """The store's durable side, as any process sees it."""
    return ColdStore.open(store._async.backend.cold.uri, "none")
