"""A cold store in a fresh folder, and rows to put in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raymem.cold.rows import JournalRows
from raymem.cold.store import ColdStore
from raymem.types import BankSpec, Fingerprint, Trace

LAYERS, WIDTH = 2, 9
SPEC = BankSpec(
    kind="spalm",
    fingerprint=Fingerprint(model="m", content="c", layers=(3, 5), width=WIDTH, tokenizer="t"),
)


@pytest.fixture
def spec() -> BankSpec:
    return SPEC


@pytest.fixture
def store(tmp_path: Path) -> ColdStore:
    return ColdStore.open(str(tmp_path / "store"))


@pytest.fixture
def rows() -> Callable[..., JournalRows]:
    """Make rows of one run: `rows(count, pos)`; the run's seq is the position unless told otherwise."""

    def make(
        count: int, pos: int, *, stream: str = "s", run: str = "r", epoch: int = 0, values: int = 0
    ) -> JournalRows:
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
