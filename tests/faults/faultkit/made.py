"""Rows that follow from their names, so that any process can say what they must be; and a model that does not exist."""

from functools import lru_cache
from zlib import crc32

import torch

from raymem import BankSpec, Calibration, Fingerprint, KeySpec, Trace
from raymem.encode.calibration import Range
from raymem.storage.store import ColdStore

LAYERS, WIDTH = (3, 5), 16
LONGEST = 2048


def calibration() -> Calibration:
    ranges = {KeySpec(layers=(layer,)): Range(0.2, 0.95) for layer in LAYERS}
    return Calibration(model="content", layers=LAYERS, mean_LD=torch.full((len(LAYERS), WIDTH), 0.5), ranges=ranges)


def spec(kind: str = "spalm") -> BankSpec:
    named = {"model": "tiny", "content": "content", "tokenizer": "tokens"}
    fingerprint = Fingerprint(layers=LAYERS, width=WIDTH, calibration=calibration().hash, **named)
    return BankSpec(kind=kind, fingerprint=fingerprint, key=KeySpec(layers=(5,)))


def open_cold(uri: str, sync: str | None = None) -> ColdStore:
    """A cold store that has the calibration which `spec` names."""
    cold = ColdStore.open(uri, sync)
    made = calibration()
    cold.calibrations.put(made.hash, made.model, made.layers, made.to_bytes())
    return cold


@lru_cache(64)
def _run(stream: str, run: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(crc32(f"{stream}/{run}".encode()))
    hidden = torch.randn(LONGEST, len(LAYERS), WIDTH, generator=generator) + 0.5
    return hidden.bfloat16(), torch.randint(0, 50, (LONGEST,), generator=generator)


def trace(stream: str, run: str, seq: int, rows: int) -> Trace:
    """Rows of a run from `seq` on: cut anywhere, they are the same rows."""
    hidden, tokens = (tensor[seq : seq + rows] for tensor in _run(stream, run))
    assert len(tokens) == rows, "a run of the schedule grew too long"
    return Trace(hidden, tokens, stream, run, seq, time=1.0)
