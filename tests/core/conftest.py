from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import raymem
from raymem import BankSpec, Calibration, Fingerprint, KeySpec, Store, Trace
from raymem.encode.calibration import Range

WIDTH = 24
LONGEST_RUN = 1000


@pytest.fixture
def calibration() -> Calibration:
    """Statistics of a model that does not exist: small off-centre states of two layers."""
    ranges = {KeySpec(layers=(layer,)): Range(0.2, 0.95) for layer in (3, 5)}
    return Calibration(model="content", layers=(3, 5), mean_LD=torch.full((2, WIDTH), 0.5), ranges=ranges)


@pytest.fixture
def fingerprint() -> Fingerprint:
    return Fingerprint(model="tiny", content="content", layers=(3, 5), width=WIDTH, tokenizer="tokens")


@pytest.fixture
def spec(fingerprint: Fingerprint) -> BankSpec:
    return BankSpec(kind="spalm", fingerprint=fingerprint, key=KeySpec(layers=(5,)))


@pytest.fixture
def store(tmp_path: Path, calibration: Calibration) -> Iterator[Store]:
    with raymem.connect(tmp_path / "memory") as opened:
        opened.put_calibration(calibration)
        yield opened


@pytest.fixture
def make_trace():
    """Traces of random states: the same run, seq and seed give the same rows, however they are cut."""

    def make(rows: int = 20, *, stream: str = "s", run: str = "r", seq: int = 0, seed: int = 0) -> Trace:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(LONGEST_RUN, 2, WIDTH, generator=generator) + 0.5
        tokens = torch.randint(0, 50, (LONGEST_RUN,), generator=generator)
        piece = slice(seq, seq + rows)
        return Trace(hidden[piece].bfloat16(), tokens[piece], stream, run, seq, time=1.0)

    return make
