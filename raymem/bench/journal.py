"""How fast rows become durable and a bank comes back, beside LanceDB alone doing the same in the same sync mode."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from raymem.bench.comparison import seconds
from raymem.bench.durability import Measured
from raymem.bench.fixture import ROW_BYTES, Fixture
from raymem.config import HostSettings, Settings
from raymem.errors import StorageError
from raymem.host.host import Host
from raymem.rows import JournalRows, Trace
from raymem.storage.store import ColdStore, Entry
from raymem.storage.tables.disk import FolderSync
from raymem.storage.tables.tables import snapshot_table

_WRITERS, _BATCH_ROWS = 64, 1000
_OTHER = "bench/other"
_ROOM = Settings(host=HostSettings(caller_requests=4096, caller_bytes=2**31))


class Plain:
    """LanceDB alone: tables that a commit is added to and, with sync="disk", synced."""

    def __init__(self, fixture: Fixture, name: str, tables: int, rows: pa.Table) -> None:
        folder = fixture.folder / name
        connection = lancedb.connect(str(folder))
        self._tables = [connection.create_table(f"t{number}", rows.slice(0, 0)) for number in range(tables)]
        self._syncs: list[FolderSync | None] = [
            FolderSync(Path(folder) / f"t{number}.lance") if fixture.sync == "disk" else None
            for number in range(tables)
        ]
        for sync in self._syncs:
            if sync:
                sync.sync()

    def add(self, table: int, rows: pa.Table) -> None:
        """One durable commit."""
        self._tables[table].add(rows)
        if sync := self._syncs[table]:
            sync.sync()

    def add_all(self, rows: Sequence[pa.Table]) -> None:
        """Durable commits to the first table."""
        for each in rows:
            self.add(0, each)

    def add_everywhere(self, rows: pa.Table) -> None:
        """One durable commit to every table."""
        for table in range(len(self._tables)):
            self.add(table, rows)

    def scan_s(self) -> float:
        """Seconds to read the first table whole, batch by batch."""
        began = perf_counter()
        for batch in self._tables[0].search().to_batches(4096):
            batch.num_rows  # noqa: B018 - the batch has been read
        return perf_counter() - began

    def keep_s(self) -> float:
        """Seconds to read the first table whole into memory."""
        return seconds(self._tables[0].to_arrow)


def journal(fixture: Fixture) -> Measured:
    """Rows a second of 64 concurrent writers of 1,000-row batches to one bank, over those of LanceDB alone."""
    writers, batches = fixture.size(_WRITERS, 4), fixture.size(4, 2)
    rows = writers * batches * _BATCH_ROWS
    traces = [
        [fixture.trace(_BATCH_ROWS, run=f"{writer}", seq=batch * _BATCH_ROWS) for batch in range(batches)]
        for writer in range(writers)
    ]
    tables = [JournalRows.of(trace, 0, 0).to_arrow() for run in traces for trace in run]
    cold, ours, alone, fragments = fixture.cold(), [], [], 0
    for turn in range(fixture.repeats):
        plain = Plain(fixture, f"plain-{turn}", 1, tables[0])
        alone.append(seconds(lambda plain=plain: plain.add_all(tables)))  # type: ignore[misc]
        taken, left = asyncio.run(_write_all(fixture, cold, f"bench/bank-{turn}", traces))
        ours.append(taken)
        fragments = max(fragments, left)
    ours_s, alone_s = statistics.median(ours), statistics.median(alone)
    details = {"rows_per_s": rows / ours_s, "lancedb_rows_per_s": rows / alone_s, "writers": writers, "banks": 1}
    return Measured({"journal_ratio": alone_s / ours_s}, details | {"most_fragments": fragments})


def many_banks(fixture: Fixture) -> Measured:
    """How much faster one row goes to each of 1,000 attached banks than to LanceDB's table for each.

    The banks and the tables exist before. Beside it: the time to make and attach the banks, and the time of the first
    read of all of them afterwards, which applies the rows.
    """
    banks = fixture.size(1000, 10)
    row = JournalRows.of(fixture.trace(1), 0, 0).to_arrow()
    plain = Plain(fixture, "plain", banks, row)
    ours, beside = asyncio.run(_one_row_each(fixture, banks))
    alone = [seconds(lambda: plain.add_everywhere(row)) for _ in range(fixture.repeats)]
    ours_s, alone_s = statistics.median(ours), statistics.median(alone)
    details = {"seconds": ours_s, "lancedb_seconds": alone_s, "banks": banks}
    return Measured({"many_banks_ratio": alone_s / ours_s}, details | beside)


def attach(fixture: Fixture) -> Measured:
    """Bytes a second of a bank of 500 MB that a host at work attaches, over those of LanceDB reading the same rows.

    LanceDB's batches are dropped as they come. Beside it: LanceDB keeping all, as a bank does, and a bank without a
    snapshot, which encodes its whole journal. A virtual machine that returned unused memory to its host may take longer
    to get it back than the read takes, so memory is touched before; that time is reported too.
    """
    rows = fixture.size(434_000, 2_000)
    cold = fixture.cold()
    traces = [[fixture.trace(2 * _BATCH_ROWS, seq=seq) for seq in range(0, rows, 2 * _BATCH_ROWS)]]
    plain = Plain(fixture, "plain", 1, JournalRows.of(traces[0][0], 0, 0).to_arrow())
    for trace in traces[0]:
        plain.add(0, JournalRows.of(trace, 0, 0).to_arrow())
    asyncio.run(_write_all(fixture, cold, "bench/bank", traces))
    cold.catalog.create(_OTHER, fixture.spec())
    entry = cold.catalog.get("bench/bank")
    size, times = rows * ROW_BYTES, []
    for _ in range(fixture.repeats):
        memory_s = seconds(lambda: np.ones(size, np.uint8))
        times.append((memory_s, asyncio.run(_attach_s(cold, entry.name)), plain.scan_s(), plain.keep_s()))
    cold.tables.drop(snapshot_table(entry.id, entry.generation))
    replay_s = asyncio.run(_attach_s(cold, entry.name))
    memory_s, ours_s, alone_s, kept_s = (statistics.median(column) for column in zip(*times, strict=True))
    times_s = {"": ours_s, "lancedb_": alone_s, "lancedb_kept_": kept_s, "replay_": replay_s, "memory_": memory_s}
    details = {f"{name}mb_per_s": size / 2**20 / taken for name, taken in times_s.items()}
    return Measured({"attach_ratio": alone_s / ours_s}, details | {"rows": rows})


async def _write_all(fixture: Fixture, cold: ColdStore, name: str, traces: list[list[Trace]]) -> tuple[float, int]:
    """Seconds in which concurrent writers, each with its own run, get all their Acks; the fragments they leave."""

    async def writer(run: list[Trace]) -> None:
        for trace in run:
            await host.write(name, trace)

    host = Host(cold, _ROOM, "bench")
    cold.catalog.create(name, fixture.spec())
    await host.attach(name)
    taken = await _timed(lambda: asyncio.gather(*map(writer, traces)))
    fragments = int((await host.stats())["banks"][name]["journal"]["fragments"])
    await host.detach(name)
    await host.close()
    if cold.journal(cold.catalog.get(name)).end() != sum(len(trace) for run in traces for trace in run):
        raise StorageError(f"{name} does not have the rows that were acknowledged")
    return taken, fragments


async def _one_row_each(fixture: Fixture, banks: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each round of one row to every bank; and what came before and after, with commits of a round."""
    cold = fixture.cold()
    host = Host(cold, _ROOM, "bench")
    names = [f"bench/bank-{number}" for number in range(banks)]
    entries = [Entry(id=uuid.uuid4().hex, name=name, spec=fixture.spec(), created=time.time()) for name in names]
    made_s = seconds(lambda: cold.catalog.add_together(entries))
    attached_s = await _timed(lambda: asyncio.gather(*map(host.attach, names)))
    taken = []
    for seq in range(fixture.repeats):
        trace = fixture.trace(1, seq=seq)
        taken.append(await _timed(lambda: asyncio.gather(*(host.write(name, trace) for name in names))))  # noqa: B023
    beside = {"made_s": made_s, "attached_s": attached_s}
    beside["commits"] = (await host.stats())["log"]["commits"] / fixture.repeats
    query = fixture.trace(1).hidden
    beside["first_read_s"] = await _timed(lambda: asyncio.gather(*(host.read(name, query, 1) for name in names)))
    if cold.journal(cold.catalog.get(names[-1])).end() != fixture.repeats:
        raise StorageError(f"{names[-1]} does not have the rows that were acknowledged")
    await host.close()
    return taken, beside


async def _attach_s(cold: ColdStore, name: str) -> float:
    host = Host(cold, _ROOM, "bench")
    # so that its lease and its log are there
    await host.attach(_OTHER)
    taken = await _timed(lambda: host.attach(name))
    await host.detach(name)
    await host.close()
    return taken


async def _timed(work: Callable[[], Awaitable[Any]]) -> float:
    began = perf_counter()
    await work()
    return perf_counter() - began
