"""How long a shard's banks are away after kill -9: from the kill until every one of them answers a read."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import lancedb
import pyarrow as pa
import ray

import raymem
from raymem.actors.cluster import local_nodes
from raymem.bench.durability import Measured
from raymem.bench.fixture import Fixture
from raymem.config import ActorSettings, ColdSettings, Settings
from raymem.errors import RaymemError, StorageError
from raymem.rows import JournalRows

_GIVE_UP_S = 120.0
_Wait = Callable[[], Any]


def measure(fixture: Fixture) -> Measured:
    """Seconds to bring back a shard with 100 banks; beside it Ray's restart of an empty actor and LanceDB's reading."""
    banks, rows = fixture.size(100, 3), fixture.size(200, 20)
    cold = ColdSettings(sync=fixture.sync)
    settings = Settings(cold=cold, actors=ActorSettings(cpus_per_shard=0.1))
    with local_nodes(1, cpus=2):
        fixture.cold()
        with raymem.connect("ray", cold=str(fixture.folder / "memory"), settings=settings) as store:
            recovery_s = _recovery(fixture, store, banks, rows)
        restart_s = _empty_restart()
    scan_s = _lancedb(fixture, banks, rows)
    details = {"ray_restart_s": restart_s, "lancedb_scan_s": scan_s, "banks": banks, "rows_per_bank": rows}
    return Measured({"recovery_s": recovery_s}, details)


def _recovery(fixture: Fixture, store: raymem.Store, banks: int, rows: int) -> float:
    made = [store.create(f"bench/bank-{number}", fixture.spec()) for number in range(banks)]
    for bank in made:
        bank.write(fixture.trace(rows, stream=bank.name))
    digests = [bank.digest() for bank in made[:3]]
    query = fixture.trace(1).hidden
    began = time.perf_counter()
    os.kill(int(store.stats()["shards"][0]["pid"]), signal.SIGKILL)
    for bank in made:
        _until_answered(lambda bank=bank: bank.read(query, 1))  # type: ignore[misc]
    taken = time.perf_counter() - began
    if [bank.digest() for bank in made[:3]] != digests or any(bank.info().rows != rows for bank in made):
        raise StorageError("the banks that came back are not those that were there: rows or states differ")
    return taken


def _empty_restart() -> float:
    class Empty:
        def pid(self) -> int:
            # what any shard imports before it can read a bank
            importlib.import_module("raymem.actors.shard")
            return os.getpid()

    actor = ray.remote(Empty).options(max_restarts=-1, max_task_retries=-1, num_cpus=0.1).remote()
    pid = ray.get(actor.pid.remote())
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    ray.get(actor.pid.remote())
    taken = time.perf_counter() - began
    ray.kill(actor)
    return taken


def _lancedb(fixture: Fixture, banks: int, rows: int) -> float:
    connection = lancedb.connect(str(fixture.folder / "lancedb"))
    plain = JournalRows.of(fixture.trace(rows), 0, 0).to_arrow()
    for number in range(banks):
        connection.create_table(f"bank-{number}", plain)
    began = time.perf_counter()
    read: list[pa.Table] = [connection.open_table(f"bank-{number}").to_arrow() for number in range(banks)]
    taken = time.perf_counter() - began
    assert sum(map(len, read)) == banks * rows
    return taken


def _until_answered(ask: _Wait) -> None:
    deadline = time.monotonic() + _GIVE_UP_S
    while True:
        try:
            ask()
            return
        except RaymemError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
