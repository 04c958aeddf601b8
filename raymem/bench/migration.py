"""Moving a hot bank to another node while it is written: how long writes pause, and how long all of it takes."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raymem
from raymem.actors.cluster import living_nodes, local_nodes
from raymem.bench.durability import Measured
from raymem.bench.fixture import ROW_BYTES, Fixture
from raymem.config import ColdSettings, HostSettings, Settings
from raymem.errors import StorageError
from raymem.types import MigrationReport

_BATCH_ROWS = 4096
_WRITER_ROWS = 4
_STORE_BYTES = 1536 * 2**20


def measure(fixture: Fixture) -> Measured:
    """Pause and total time for a bank of 500 MB and one of 5 MB; beside it Ray's copy of as many bytes.

    Both have a snapshot of what was written before the moves, and are written to, row by row, during them.
    """
    large, small = (fixture.size(count * 2**20, count * 2**14) for count in (500, 5))
    settings = Settings(cold=ColdSettings(sync=fixture.sync), host=HostSettings(threads=2))
    with local_nodes(2, cpus=1, object_store_bytes=_STORE_BYTES):
        fixture.cold()
        with raymem.connect("ray", cold=str(fixture.folder / "memory"), settings=settings) as store:
            reports, gap_s = _moves(fixture, store, "bench/large", large)
            small_reports, small_gap_s = _moves(fixture, store, "bench/small", small)
        copies = [_copy_s(large) for _ in range(fixture.repeats)]
    total_s, copy_s = _median([report.total_ms / 1e3 for report in reports]), _median(copies)
    figures = {
        "migration_pause_ms": _median([report.pause_ms for report in reports]),
        "migration_pause_ms_small": _median([report.pause_ms for report in small_reports]),
        "migration_ratio": total_s / copy_s,
    }
    details = {
        "ray_copy_s": copy_s,
        "total_s": total_s,
        "bank_bytes": large,
        "longest_wait_for_an_ack_ms": 1e3 * gap_s,
        "longest_wait_for_an_ack_ms_small": 1e3 * small_gap_s,
    }
    return Measured(figures, details)


def _median(values: list[float]) -> float:
    return float(statistics.median(values))


def _moves(fixture: Fixture, store: raymem.Store, name: str, nbytes: int) -> tuple[list[MigrationReport], float]:
    bank = store.create(name, fixture.spec())
    rows = max(_BATCH_ROWS, nbytes // ROW_BYTES)
    for seq in range(0, rows, _BATCH_ROWS):
        bank.write(fixture.trace(min(_BATCH_ROWS, rows - seq), seq=seq))
    bank.detach()
    bank.attach()
    reports = []
    with _writer(fixture, bank) as waits:
        for _ in range(fixture.repeats):
            here = bank.info().node
            reports.append(bank.migrate(next(node for node in store.nodes() if node != here)))
    if bank.info().rows != rows + _WRITER_ROWS * len(waits):
        raise StorageError(f"{name} has {bank.info().rows} rows, and {rows + _WRITER_ROWS * len(waits)} were written")
    return reports, max(waits)


@contextmanager
def _writer(fixture: Fixture, bank: raymem.Bank) -> Iterator[list[float]]:
    """A thread that writes all the time; the list has how long each write waited, in seconds."""
    stop, waits = threading.Event(), [0.0]
    waits.clear()

    def write() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            bank.write(fixture.trace(_WRITER_ROWS, run="writer", seq=_WRITER_ROWS * len(waits)))
            waits.append(time.perf_counter() - began)
            # a steady stream, not a flood that competes with the move for the processor
            stop.wait(0.005)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join()


class _Holder:
    """Bytes in an actor's own memory."""

    def __init__(self, nbytes: int) -> None:
        self.data: Any = np.ones(nbytes, np.uint8)

    def give(self) -> Any:
        return self.data

    def take(self, data: Any) -> int:
        # out of the object store, as any work with it has to
        self.data = data.copy()
        return len(self.data)


def _copy_s(nbytes: int) -> float:
    source, target = (_actor(node.id, size) for node, size in zip(living_nodes(), (nbytes, 1), strict=True))
    # both have started, with their imports loaded
    ray.get([actor.take.remote(np.ones(size, np.uint8)) for actor, size in ((source, nbytes), (target, 1))])
    began = time.perf_counter()
    assert ray.get(target.take.remote(source.give.remote())) == nbytes
    taken = time.perf_counter() - began
    for actor in (source, target):
        ray.kill(actor)
    return taken


def _actor(node: str, nbytes: int) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_Holder).options(num_cpus=0.1, scheduling_strategy=pinned).remote(nbytes)
