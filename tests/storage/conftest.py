"""A cold store in a fresh folder, rows to put in it, and other processes that use it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.rows import JournalRows, Trace
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.log import Log
from raymem.storage.store import ColdStore
from raymem.storage.tables.single_writer_table import SingleWriterTable
from raymem.types import BankSpec, Fingerprint

LAYERS, WIDTH = 2, 9

Worker = Callable[..., "subprocess.Popen[str]"]
MakeRows = Callable[..., JournalRows]


@pytest.fixture
def spec() -> BankSpec:
    return BankSpec(
        kind="spalm",
        fingerprint=Fingerprint(model="m", content="c", layers=(3, 5), width=WIDTH, tokenizer="t"),
    )


@pytest.fixture
def store(tmp_path: Path) -> ColdStore:
    return ColdStore.open(str(tmp_path / "store"))


@pytest.fixture
def journal(store: ColdStore, spec: BankSpec) -> Journal:
    """The journal of a new bank named lab/a."""
    return store.journal(store.catalog.create("lab/a", spec))


@pytest.fixture
def rows() -> MakeRows:
    """Make rows of one run: `rows(count, pos)`; the run's seq is the position."""

    def make(count: int, pos: int, *, stream: str = "s", run: str = "r", values: int = 0) -> JournalRows:
        generator = torch.Generator().manual_seed(pos)
        trace = Trace(
            hidden=torch.randn(count, LAYERS, WIDTH, generator=generator).bfloat16(),
            tokens=torch.randint(0, 50_000, (count,), generator=generator),
            stream=stream,
            run=run,
            seq=pos,
            values=torch.randn(count, values, generator=generator) if values else None,
            time=1.0,
        )
        return JournalRows.of(trace, pos, epoch=0)

    return make


@pytest.fixture
def worker(root: Path) -> Iterator[Worker]:
    """Start workers.py in a process of its own; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: object) -> "subprocess.Popen[str]":
        command = [sys.executable, str(Path(__file__).with_name("workers.py")), *map(str, args)]
        env = os.environ | {"PYTHONPATH": str(root)}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def owned(store: ColdStore, spec: BankSpec) -> Callable[..., Journal]:
    """The journal of a bank that the owner of a log has just claimed; the bank is made if there is none."""

    def claim(log: Log | None, name: str = "lab/a", spec: BankSpec = spec, flushed: Log | None = None) -> Journal:
        if not store.catalog.list(name):
            store.catalog.create(name, spec)
        entry = store.catalog.get(name)
        taken = store.catalog.claim(name, "me", entry.epoch, log and log.id, flushed and flushed.id)
        journal = store.journal(taken, log)
        journal.fence()
        return journal

    return claim


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done once, when the next fence has opened the table and is about to commit."""

    def meanwhile(happens: Callable[[], object]) -> None:
        bar = SingleWriterTable._bar

        def late(table: SingleWriterTable, *args: Any) -> bool:
            monkeypatch.setattr(SingleWriterTable, "_bar", bar)
            happens()
            return bar(table, *args)

        monkeypatch.setattr(SingleWriterTable, "_bar", late)

    return meanwhile
