from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import raymem
from raymem import Store, Trace
from raymem.storage.store import ColdStore
from raymem.train import TrainReport, TrainSettings, train

# enough to learn something
ROWS = 2400
# enough to be trained on
FEW = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memory"


@pytest.fixture
def store(folder: Path, tiny) -> Iterator[Store]:
    with raymem.connect(folder) as opened:
        opened.put_calibration(tiny.calibration)
        yield opened


@pytest.fixture
def cold(store: Store, folder: Path) -> ColdStore:
    return ColdStore.open(str(folder))


@pytest.fixture
def fill(store: Store, tiny) -> Callable[..., str]:
    """A bank of the rows given: keys `[N, 24]` and the token that follows each."""

    def make(kind: str, keys_NK: Tensor, tokens_N: Tensor, name: str | None = None, **options: Any) -> str:
        name = name or f"lab/{kind}"
        bank = store.create(name, tiny.spec(kind, **options))
        # the state at position 0 is a sink, and a row's token is the next one's
        states = torch.cat([keys_NK[:1], keys_NK, keys_NK[-1:]]) + 0.5
        ids = torch.cat([torch.zeros(2, dtype=torch.int64), tokens_N])
        bank.write(Trace(states[:, None].repeat(1, 2, 1).bfloat16(), ids, "s", "r", time=1.0))
        return name

    return make


@pytest.fixture
def fit(cold: ColdStore, tmp_path: Path) -> Callable[..., TrainReport]:
    """Train with checkpoints in a folder of the test's."""

    def run(name: str, kind: str, *, every: int = 2, fresh: bool = False, progress: Any = None, **settings: Any):
        where = {"folder": tmp_path / "checkpoints", "every": every, "fresh": fresh, "progress": progress}
        return train(cold, name, TrainSettings(kind=kind, **settings), **where)

    return run


def smooth(count: int, seed: int, width: int = 24) -> Tensor:
    """Rows whose dimensions move at different speeds: AR(1) with memory up to ~16 steps."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.linspace(0.3, 0.95, width)
    rows = [torch.randn(width, generator=generator)]
    for _ in range(count - 1):
        rows.append(keep * rows[-1] + (1 - keep**2).sqrt() * torch.randn(width, generator=generator))
    return torch.stack(rows)


def facts(count: int, seed: int, span: int = 4, share: float = 0.25) -> tuple[Tensor, Tensor]:
    """Stretches of `span` rows, some marked along one direction: those come back with their tokens, the rest never do.

    There are six marked things to remember; each comes back as it was, a little blurred.
    """
    generator = torch.Generator().manual_seed(seed)
    things = normalize(torch.randn(6, span, 24, generator=generator), dim=-1)
    things[..., 0] = 1.0
    keys, tokens = [], []
    for number in range(count // span):
        if float(torch.rand((), generator=generator)) < share:
            thing = int(torch.randint(6, (), generator=generator))
            keys.append(things[thing] + 0.05 * torch.randn(span, 24, generator=generator))
            tokens.append(torch.arange(span) + 10 * thing)
        else:
            noise = normalize(torch.randn(span, 24, generator=generator), dim=-1)
            noise[..., 0] = -1.0
            keys.append(noise)
            tokens.append(1000 + number * span + torch.arange(span))
    return torch.cat(keys), torch.cat(tokens)


@pytest.fixture
def rows_of() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Rows from which each kind has something to learn."""
    return _rows_of(ROWS)


@pytest.fixture
def few_of() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Rows of the same make on which each kind can be trained, whatever comes of it."""
    return _rows_of(FEW)


def _rows_of(count: int) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(7)
    return {
        # a compressor is judged on whole stretches of blocks
        "compressive": lambda: (smooth(2 * count, 0), torch.randint(50, (2 * count,), generator=generator)),
        "dct": lambda: facts(count, 1),
        "lemn": lambda: facts(count, 2, span=1),
    }
