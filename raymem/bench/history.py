"""What a fork costs: seconds until it is there and the bytes it adds, beside copying the same table with LanceDB."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import lancedb
import torch

import raymem
from raymem.bench.comparison import seconds
from raymem.bench.durability import Measured
from raymem.bench.fixture import ROW_BYTES, Fixture
from raymem.config import ColdSettings, Settings
from raymem.errors import StorageError
from raymem.rows import JournalRows
from raymem.storage.store import ColdStore
from raymem.storage.tables.tables import journal_table

_BANK = "bench/parent"
_BATCH_ROWS = 2**15


def measure(fixture: Fixture) -> Measured:
    """Forks of a bank of 500 MB, at its end and half-way; median seconds, most bytes added."""
    rows = fixture.size(500 * 10**6, 10**6) // ROW_BYTES
    _fill(fixture, fixture.cold(), rows)
    folder, settings = fixture.folder / "memory", Settings(cold=ColdSettings(sync=fixture.sync))
    times, grown = [], []
    with raymem.connect(folder, settings=settings) as store:
        for number in range(2 * fixture.repeats):
            at, before = rows // (1 + number % 2), _bytes(folder)
            began = time.perf_counter()
            fork = store.fork(_BANK, f"bench/fork-{number}", at)
            times.append(time.perf_counter() - began)
            grown.append(_bytes(folder) - before)
            if fork.info().rows != at:
                raise StorageError(f"a fork at {at} of a bank of {rows} rows has {fork.info().rows}")
    copy_s = seconds(lambda: _copy(fixture, folder))
    figures = {"fork_s": statistics.median(times), "fork_new_bytes": float(max(grown))}
    return Measured(figures, {"lancedb_copy_s": copy_s, "rows": rows, "bytes": rows * ROW_BYTES})


def _fill(fixture: Fixture, cold: ColdStore, rows: int) -> None:
    journal = cold.journal(cold.catalog.create(_BANK, fixture.spec()))
    made = JournalRows.of(fixture.trace(min(rows, _BATCH_ROWS)), 0, 0)
    for pos in range(0, rows, _BATCH_ROWS):
        part = made.part(0, min(_BATCH_ROWS, rows - pos))
        # these rows are never read, so identities and checksums may repeat
        journal.append(dataclasses.replace(part, pos_T=torch.arange(pos, pos + len(part), dtype=torch.int64)))


def _copy(fixture: Fixture, folder: Path) -> None:
    cold = ColdStore.open(str(folder), fixture.sync)
    table = cold.tables.open(journal_table(cold.catalog.get(_BANK).id))
    lancedb.connect(str(fixture.folder / "copy")).create_table(
        "copy", table.to_lance().to_batches(), schema=table.schema
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
