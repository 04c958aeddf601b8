"""What a figure of durability is measured on: a folder, a model that does not exist, and rows of its random states."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from raymem.encode.calibration import Calibration, Range
from raymem.rows import Trace
from raymem.storage.store import ColdStore
from raymem.types import BankSpec, Fingerprint, KeySpec

# a row of [1, 576] in bfloat16, the hidden width of a small language model
_LAYERS, WIDTH = (1,), 576
ROW_BYTES = 2 * WIDTH * len(_LAYERS)


@dataclass(frozen=True)
class Fixture:
    """Where and how a figure is measured.

    Args:
        folder: an empty one for the figure, removed afterwards.
        sync: the cold store's mode, for ours and for the peers.
        small: tiny sizes, to see that everything runs.
        repeats: how often each way of doing the work is timed; medians are reported.
    """

    folder: Path
    sync: Literal["disk", "none"] = "disk"
    small: bool = False
    repeats: int = 5

    def size(self, full: int, small: int) -> int:
        """`full`, or `small` where tiny sizes were asked for."""
        return small if self.small else full

    def cold(self, name: str = "memory") -> ColdStore:
        """A cold store in the folder, with the calibration that `spec` names."""
        store = ColdStore.open(str(self.folder / name), self.sync)
        made = self.calibration
        store.calibrations.put(made.hash, made.model, made.layers, made.to_bytes())
        return store

    @property
    def calibration(self) -> Calibration:
        """Statistics of the model that does not exist."""
        ranges = {KeySpec(layers=_LAYERS): Range(0.2, 0.95)}
        return Calibration(
            model="content", layers=_LAYERS, mean_LD=torch.full((len(_LAYERS), WIDTH), 0.5), ranges=ranges
        )

    def spec(self, kind: str = "spalm", budget_bytes: int = 2**31) -> BankSpec:
        """What a bank for such rows is."""
        fingerprint = Fingerprint(
            model="bench",
            content="content",
            tokenizer="tokens",
            layers=_LAYERS,
            width=WIDTH,
            calibration=self.calibration.hash,
        )
        return BankSpec(kind=kind, fingerprint=fingerprint, budget_bytes=budget_bytes)

    def trace(self, rows: int, *, stream: str = "s", run: str = "r", seq: int = 0) -> Trace:
        """Random rows of a run, from `seq` on."""
        generator = torch.Generator().manual_seed(seq)
        hidden = torch.randn(rows, len(_LAYERS), WIDTH, generator=generator) + 0.5
        tokens = torch.randint(0, 1000, (rows,), generator=generator)
        return Trace(hidden.bfloat16(), tokens, stream, run, seq, time=1.0)


@contextmanager
def fixture(
    parent: Path | None, sync: Literal["disk", "none"], *, small: bool = False, repeats: int = 5
) -> Iterator[Fixture]:
    """A fixture in a fresh folder under `parent`, by default where temporary files go."""
    with tempfile.TemporaryDirectory(prefix="raymem-bench-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Fixture(Path(folder), sync, small, repeats)
