"""A small calibration and journal rows to encode with it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from raymem.encode import Calibration, Encoder
from raymem.encode.fit import Sample, fit
from raymem.rows import JournalRows
from raymem.types import BankSpec, Fingerprint, KeySpec

LAYERS, WIDTH = (3, 7), 13
MODEL = "0" * 64


def hidden_of(rows: int, seed: int, layers: int = len(LAYERS)) -> torch.Tensor:
    """States with a mean far from zero, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, layers, WIDTH, generator=generator) * 3 + 5).bfloat16()


def sample_of(seed: int = 0) -> Sample:
    """Random texts; the matching passages are noisy copies of the bank's."""
    bank = [hidden_of(90, seed + text) for text in range(3)]
    noisy = [(hidden[40:].float() + 0.3 * torch.randn(50, 2, WIDTH)).bfloat16() for hidden in bank]
    return Sample(bank, [hidden_of(90, seed + 100 + text) for text in range(3)], noisy)


@pytest.fixture(scope="session", params=[None, 0.1], ids=["centred", "whitened"])
def calibration(request: pytest.FixtureRequest) -> Calibration:
    torch.manual_seed(0)
    return fit(MODEL, LAYERS, sample_of(), shrink=request.param)


def spec_for(calibration: Calibration, key: KeySpec, values: str = "e" * 64) -> BankSpec:
    fingerprint = Fingerprint(
        model="tiny",
        content=calibration.model,
        layers=LAYERS,
        width=WIDTH,
        tokenizer="t" * 64,
        calibration=calibration.hash,
        values=values,
    )
    return BankSpec(kind="spalm", fingerprint=fingerprint, key=key)


@pytest.fixture(scope="session")
def encoder(calibration: Calibration) -> Callable[..., Encoder]:
    def make(key: KeySpec | None = None, values: str = "e" * 64, **options: int) -> Encoder:
        return Encoder(spec_for(calibration, key or KeySpec(), values), calibration, **options)

    return make


def journal(where: list[tuple[str, int]], *, values: bool = True) -> JournalRows:
    """Rows of these (run, seq), in this order; a row's content follows from its identity alone."""
    seeds = [hash_of(run) * 1_000 + seq for run, seq in where]
    hidden = torch.cat([hidden_of(1, seed) for seed in seeds]) if seeds else hidden_of(0, 0)
    rows = len(where)
    return JournalRows(
        pos_T=torch.arange(rows),
        epoch=1,
        streams=["stream"] * rows,
        runs=[run for run, _ in where],
        seq_T=torch.tensor([seq for _, seq in where], dtype=torch.int64),
        token_T=torch.tensor([seed % 49_999 for seed in seeds], dtype=torch.int64),
        hidden_TLD=hidden,
        value_TV=hidden[:, 0].float() if values else None,
        time_T=torch.zeros(rows, dtype=torch.float64),
        crc_T=torch.zeros(rows, dtype=torch.int64),
    )


def hash_of(run: str) -> int:
    return sum(map(ord, run))


def cut(rows: JournalRows, start: int, stop: int) -> JournalRows:
    """Rows start to stop of a journal."""
    part = slice(start, stop)
    return JournalRows(
        pos_T=rows.pos_T[part],
        epoch=rows.epoch,
        streams=rows.streams[part],
        runs=rows.runs[part],
        seq_T=rows.seq_T[part],
        token_T=rows.token_T[part],
        hidden_TLD=rows.hidden_TLD[part],
        value_TV=None if rows.value_TV is None else rows.value_TV[part],
        time_T=rows.time_T[part],
        crc_T=rows.crc_T[part],
    )


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers of this file, for tests to call."""
    return SimpleNamespace(
        LAYERS=LAYERS,
        WIDTH=WIDTH,
        cut=cut,
        hidden_of=hidden_of,
        journal=journal,
        sample_of=sample_of,
        spec_for=spec_for,
    )
