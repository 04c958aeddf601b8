"""What every test shares: a quiet, offline, seeded environment, uninitialised memory that shows, a table of figures."""

import asyncio
import dataclasses
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest_plugins = ["spreading", "lending"]
ROOT = Path(__file__).parents[1]

# set before anything imports triton, vllm or ray: they read these once
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # two busy threads on a busy machine wait for each other at every small operation
    "OMP_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # two engines would be bound to the same core, while another is free
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# without the CUDA driver, tests marked gpu aren't collected
GPU = Path("/dev/nvidiactl").exists()
if not GPU:
    ENVIRONMENT["TRITON_INTERPRET"] = "1"
# a store syncs many small files, and most tests of one would wait for the disk: in memory, where there is room
MEMORY, ROOM_BYTES = Path("/dev/shm"), 6 * 2**30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
    ENVIRONMENT["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# some fifty processes import raymem: each would compile it anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's root folder."""
    return ROOT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


class Tiny:
    """A model that does not exist: its calibration, specs of banks for it, and traces of its random states."""

    width = 24
    layers = (3, 5)

    @property
    def calibration(self) -> Any:
        from raymem import Calibration, KeySpec
        from raymem.encode.calibration import Range

        ranges = {KeySpec(layers=(layer,)): Range(0.2, 0.95) for layer in self.layers}
        mean_LD = self._torch.full((len(self.layers), self.width), 0.5)
        return Calibration(model="content", layers=self.layers, mean_LD=mean_LD, ranges=ranges)

    @property
    def fingerprint(self) -> Any:
        from raymem import Fingerprint

        return Fingerprint(model="tiny", content="content", layers=self.layers, width=self.width, tokenizer="tokens")

    def spec(self, kind: str = "spalm", **options: Any) -> Any:
        from raymem import BankSpec, KeySpec

        fingerprint = self.fingerprint.model_copy(update={"calibration": self.calibration.hash})
        return BankSpec(kind=kind, fingerprint=fingerprint, key=KeySpec(layers=(5,)), options=options)

    def trace(self, rows: int = 20, *, stream: str = "s", run: str = "r", seq: int = 0, seed: int = 0) -> Any:
        """Rows of one endless sequence per seed, from `seq` on: cut anywhere, they are the same rows."""
        from raymem import Trace

        made = self._rows(seq + rows, seed)
        hidden, tokens = (tensor[seq:] for tensor in made)
        return Trace(hidden.bfloat16(), tokens, stream, run, seq, time=1.0)

    def talk(self, stream: str, rows: int, *, run: str = "r1", seq: int = 0, time: float = 1.0) -> Any:
        """Rows that no other stream or run has."""
        made = self.trace(rows, stream=stream, run=run, seq=seq, seed=sum(map(ord, stream + run)))
        return dataclasses.replace(made, time=time)

    def _rows(self, count: int, seed: int) -> tuple[Any, Any]:
        # a fixed length first: random numbers drawn in one piece are not those drawn in another
        longest = 4096
        assert count <= longest
        generator = self._torch.Generator().manual_seed(seed)
        hidden = self._torch.randn(longest, len(self.layers), self.width, generator=generator) + 0.5
        tokens = self._torch.randint(0, 50, (longest,), generator=generator)
        return hidden[:count], tokens[:count]

    @property
    def _torch(self) -> Any:
        import torch

        return torch


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Return what a test needs to fill banks without a model."""
    return Tiny()


@pytest.fixture(scope="module")
def file_store(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Iterator[Any]:
    """A local store with the tiny model's calibration, one for all tests of a file."""
    import raymem

    with raymem.connect(tmp_path_factory.mktemp("store") / "memory") as opened:
        opened.put_calibration(tiny.calibration)
        yield opened


class Ran(NamedTuple):
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)


@pytest.fixture
def raymem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command line in this process, as the script would."""
    from raymem.cli.app import main

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["raymem", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Ran(code, *capsys.readouterr())

    return run


@contextmanager
def _gateway(folder: Path, settings: Any, wrap: Callable[[Any], Any] = lambda app: app) -> Iterator[str]:
    from raymem import AsyncStore
    from raymem.serving.app import create_app
    from raymem.serving.server import address, bind, make_server

    async def opener() -> AsyncStore:
        return await AsyncStore.connect(folder, settings=settings)

    listener = bind("127.0.0.1", 0)
    server = make_server(wrap(create_app(opener, settings)), settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the gateway did not start"
            time.sleep(0.01)
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def run_gateway() -> Callable[..., Any]:
    """A context manager: a real gateway over a real local store on a loopback port; gives its address."""
    return _gateway


@pytest.fixture
def run_example(root: Path, tmp_path: Path) -> Callable[[str], str]:
    """Run an example as it stands in the repository, in an empty folder; give what it printed."""

    def run(name: str) -> str:
        command = [sys.executable, str(root / "examples" / name)]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    return run


def _poisoned(make: Any, torch: Any) -> Any:
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        tensor = make(*args, **kwargs)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("raymem"):
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return poisoned


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    # fresh pages read as zeros, which hides a lane that nobody wrote. other people's calls stay as they are
    if torch := sys.modules.get("torch"):
        # `with torch.device(...)` remembers, from its first use on, which functions make tensors: the real ones
        importlib.import_module("torch.utils._device")._device_constructors()
        monkeypatch.setattr(torch, "empty", _poisoned(torch.empty, torch))
        monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like, torch))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty, torch))


KINDS = ("compressive", "dct", "ntm", "dnc", "lemn", "titans", "spalm", "larimar")
COLUMNS = ("kind", "task", "figure", "baseline", "bound", "paper", "seconds")
# some take minutes, on a busy machine several times as many
SLOW_TIMEOUT_S = 1800
# where figures are kept between runs, if anywhere
FILE = Path(os.environ["FIGURES_FILE"]) if "FIGURES_FILE" in os.environ else None
FIGURES = pytest.StashKey[dict[tuple[str, str], dict[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin with the figures of earlier runs."""
    kept = json.loads(FILE.read_text()) if FILE and FILE.exists() else []
    config.stash[FIGURES] = {(row["kind"], row["task"]): row for row in kept}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what measures a figure, so that `make test-slow` shows all of them in one table; give slow tests time."""
    if not GPU:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
        if "figure" in getattr(item, "fixturenames", ()):
            item.add_marker("figures")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a recorder of figures, which also fails the test when a figure misses its bound."""
    start = time.perf_counter()

    def record(
        kind: str,
        task: str,
        value: float,
        *,
        below: float | None = None,
        above: float | None = None,
        baseline: dict[str, float] | None = None,
        paper: str = "–",
    ) -> None:
        least, most = (float("-inf") if above is None else above), (float("inf") if below is None else below)
        bounds = [f"≥ {above:.3g}" if above is not None else "", f"≤ {below:.3g}" if below is not None else ""]
        shown = (
            kind,
            task,
            f"{value:.3g}",
            ", ".join(f"{name} {other:.3g}" for name, other in (baseline or {}).items()) or "–",
            " ".join(filter(None, bounds)) + ("" if least <= value <= most else " MISSED"),
            paper,
            f"{time.perf_counter() - start:.0f}",
        )
        request.config.stash[FIGURES][kind, task] = dict(zip(COLUMNS, shown, strict=True))
        _keep(request.config)
        assert least <= value <= most, f"{kind}, {task}: {value} is not {' '.join(filter(None, bounds))}"

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of figures."""
    if rows := _rows(config):
        terminalreporter.section("figures")
        for line in _aligned([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]):
            terminalreporter.write_line(line)


def _rows(config: pytest.Config) -> list[dict[str, str]]:
    return sorted(config.stash[FIGURES].values(), key=lambda row: KINDS.index(row["kind"]))


def _keep(config: pytest.Config) -> None:
    # at once: a run that is killed loses none
    if FILE:
        FILE.write_text(json.dumps(_rows(config), indent=2, ensure_ascii=False) + "\n")


def _aligned(rows: list[Iterable[str]]) -> list[str]:
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
