"""`raymem bench` writes the figures it promises. No figure is tested."""

import asyncio
import inspect
import json
from contextlib import ExitStack, contextmanager

import pytest

from raymem.bench import durability
from raymem.bench.durability import KEYS, Figure, Measured
from raymem.bench.fixture import Fixture


def test_the_document_has_every_key_and_null_for_what_was_not_measured(raymem, tmp_path, monkeypatch):
    def measure(on: Fixture) -> Measured:
        assert on.sync == "none"
        assert on.folder.parent == tmp_path
        return Measured({"fork_s": 0.5}, {"lancedb_s": 1.25})

    monkeypatch.setattr(durability, "REGISTRY", (Figure("fork", "made.up"), Figure("other", "made.up")))
    monkeypatch.setattr(Figure, "measure", lambda self, on: measure(on))
    file = tmp_path / "figures.json"
    ran = raymem(
        *("bench", "durability", "--only", "fork", "--sync", "none", "--folder", tmp_path),
        *("--repeats", "2", "--json", file),
    )

    assert ran.code == 0, ran.err
    written = json.loads(file.read_text())
    assert written.keys() == {*KEYS, "sync", "details"}
    assert {name: value for name, value in written.items() if value is not None} == {
        "fork_s": 0.5,
        "sync": "none",
        "details": {"fork": {"lancedb_s": 1.25}},
    }
    assert "1.25" in ran.out


def test_what_can_not_be_measured_is_said(raymem):
    ran = raymem("bench", "durability", "--only", "speed")
    assert ran.code == 1
    assert "no figure named speed; there is fork, " in " ".join(ran.err.split())
    assert raymem("bench", "durability", "--sync", "perhaps").code == 2


def test_the_figures_of_the_journal_can_be_measured(raymem, tmp_path):
    file, names = tmp_path / "figures.json", ("journal", "many_banks", "attach")
    asked = [part for name in names for part in ("--only", name)]
    ran = raymem("bench", "durability", "--small", "--repeats", "1", *asked, "--sync", "none", "--json", file)
    assert ran.code == 0, ran.err
    figures = json.loads(file.read_text())
    assert min(figures[f"{name}_ratio"] for name in names) > 0
    # ten banks' rows in one or two commits, whichever thread was first
    assert figures["details"]["many_banks"]["commits"] <= 2


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_the_figures_of_ray_can_be_measured(raymem, tmp_path, monkeypatch):
    from raymem.actors import cluster
    from raymem.bench import migration, recovery

    # one after the other on the same nodes, the first that are asked for, without what raymem left there
    stack, asked = ExitStack(), []

    @contextmanager
    def shared(*args, **options):
        inspect.signature(cluster.local_nodes).bind(*args, **options)
        if not asked:
            stack.enter_context(cluster.local_nodes(*args, **options))
        asked.append(args)
        yield
        asyncio.run(cluster.stop())

    for figure in (migration, recovery):
        monkeypatch.setattr(figure, "local_nodes", shared)
    file = tmp_path / "figures.json"
    with stack:
        ran = raymem(
            *("bench", "durability", "--small", "--repeats", "1", "--sync", "none"),
            *("--only", "recovery", "--only", "migration", "--json", file),
        )
    assert ran.code == 0, ran.err
    assert asked == [(2,), (1,)]
    figures = json.loads(file.read_text())
    assert min(figures["recovery_s"], figures["migration_pause_ms"], figures["migration_ratio"]) > 0
