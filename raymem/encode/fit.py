"""Fitting a calibration: a model reads text that ships with Python, and its states give the statistics.

The text is the beginnings of twenty topics of `pydoc_data.topics`, the language reference: those that follow its twelve
largest in size. `raymem eval lm` reports on the six largest, tuning and the demo use the next six, and a calibration
must contain none of them.

Shape legend: `T` rows of one text, `N` rows of many, `L` layers, `D` hidden width, `K` key width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raymem.encode.calibration import Calibration, Range, measured_keys
from raymem.encode.keys import KeyMaker
from raymem.errors import InvalidInput
from raymem.types import KeySpec

RESERVED_TOPICS = 12
_TOPICS = 20
_TOPIC_TOKENS = 200
_PREFIX_TOKENS = 48
# the passage of a topic that is read again, and how many of its first rows are left out: they depend on the context
_PASSAGE = slice(64, 160)
_SKIPPED = 16
_MIN_GAP = 1e-3

Progress = Callable[[int, int], None]


class States(Protocol):
    """The part of a pass's result that a calibration reads."""

    @property
    def hidden_TLd(self) -> Tensor:
        """States of the chosen layers."""
        ...


class CalibrationModel(Protocol):
    """The part of a language model that calibrating needs; `raymem.lm.models.LanguageModel` has it."""

    content_hash: str

    def encode(self, text: str) -> Tensor:
        """Token ids [T] of a text."""
        ...

    def run_cached(self, tokens_T: Tensor, layers: Sequence[int]) -> States:
        """One causal pass; may come from an earlier one."""
        ...

    def check_length(self, tokens: int, what: str) -> None:
        """Refuse a text of more tokens than the model has positions for, naming both."""
        ...


@dataclass(frozen=True)
class Sample:
    """States [T, L, D] by text, each read as a context of its own, its row 0 first.

    `bank` is what is remembered, `unrelated` other texts, `matching` passages of the bank's texts read after a piece
    of another text, cut to the passage's rows.
    """

    bank: list[Tensor]
    unrelated: list[Tensor]
    matching: list[Tensor]


def calibrate(
    model: CalibrationModel,
    layers: Sequence[int],
    *,
    whiten: bool = False,
    shrink: float = 0.1,
    progress: Progress | None = None,
) -> Calibration:
    """Read the bundled text with a model and fit a calibration to its states; about 5,400 tokens are read.

    Args:
        model: the frozen model.
        layers: 1-based layer ids, in the order in which traces will carry them.
        whiten: also fit a whitening matrix a layer (D² floats each).
        shrink: how far the covariance is moved towards its mean eigenvalue, in (0, 1].
        progress: called with texts read and texts in all.

    Raises:
        InvalidInput: the model has fewer positions than the texts have tokens.
    """
    model.check_length(_TOPIC_TOKENS, "each text that a calibration is made from")
    sample = read_sample(model, layers, bundled_texts(), progress)
    return fit(model.content_hash, tuple(layers), sample, shrink=shrink if whiten else None)


def bundled_texts() -> list[str]:
    """The calibration's topics, in name order."""
    from pydoc_data.topics import topics

    by_size = sorted(topics, key=lambda name: (-len(topics[name]), name))
    return [topics[name] for name in sorted(by_size[RESERVED_TOPICS : RESERVED_TOPICS + _TOPICS])]


def read_sample(
    model: CalibrationModel, layers: Sequence[int], texts: Sequence[str], progress: Progress | None = None
) -> Sample:
    """Read texts with a model; of each pair the first is the bank's, a passage of it is read again after the second.

    Raises:
        InvalidInput: fewer than two texts are long enough.
    """
    tokens = [model.encode(text)[:_TOPIC_TOKENS] for text in texts]
    tokens = [ids for ids in tokens if len(ids) >= _PASSAGE.start + 2 * _SKIPPED]
    pairs = list(zip(tokens[::2], tokens[1::2], strict=False))
    if not pairs:
        raise InvalidInput(f"{len(tokens)} texts of enough tokens; a calibration needs two or more")
    sample = Sample([], [], [])
    for done, (mine, other) in enumerate(pairs):
        sample.bank.append(model.run_cached(mine, layers).hidden_TLd)
        sample.unrelated.append(model.run_cached(other, layers).hidden_TLd)
        again = torch.cat([other[-_PREFIX_TOKENS:], mine[_PASSAGE]])
        sample.matching.append(model.run_cached(again, layers).hidden_TLd[_PREFIX_TOKENS:])
        if progress is not None:
            progress(done + 1, len(pairs))
    return sample


def fit(model: str, layers: tuple[int, ...], sample: Sample, *, shrink: float | None = None) -> Calibration:
    """A calibration from states; pure.

    Args:
        model: the model's content hash.
        layers: the layers of the states.
        sample: states in any float dtype.
        shrink: None for no whitening.

    Raises:
        InvalidInput: `shrink` is not in (0, 1]; or states that no calibration can be made of, and why.
    """
    _require_varied(layers, sample)
    rows_NLD = torch.cat([hidden[1:] for hidden in [*sample.bank, *sample.unrelated]]).double()
    mean_LD = rows_NLD.mean(0).float()
    whiten_LDD = None if shrink is None else _whitening(rows_NLD - mean_LD.double(), shrink)
    plain = Calibration(model, layers, mean_LD, whiten_LDD, shrink or 0.0)
    ranges = {key: _range(plain, key, sample) for key in measured_keys(layers)}
    return Calibration(model, layers, mean_LD, whiten_LDD, shrink or 0.0, ranges).check()


def _require_varied(layers: tuple[int, ...], sample: Sample) -> None:
    """Raise InvalidInput unless there are enough rows, all are finite, and those of each layer differ."""
    parts = (sample.bank, sample.unrelated, sample.matching)
    fewest = min(sum(max(0, len(hidden) - _SKIPPED) for hidden in part) for part in parts)
    if fewest < _SKIPPED:
        raise InvalidInput(f"{fewest} rows are too few to calibrate with; read texts of {2 * _SKIPPED} tokens and more")
    rows_NLD = torch.cat([hidden.float() for part in parts for hidden in part])
    low_LD, high_LD = rows_NLD.amin(0), rows_NLD.amax(0)
    if not bool(torch.isfinite(low_LD + high_LD).all()):
        raise InvalidInput(
            "the model's states hold NaN or Inf: no calibration can be made of them. Look at its weights"
        )
    alike = [layer for layer, width in zip(layers, (high_LD - low_LD).amax(1).tolist(), strict=True) if width == 0]
    if alike:
        raise InvalidInput(f"all states of layers {alike} are alike: calibrate with other layers, or with other texts")


def _whitening(centred_NLD: Tensor, shrink: float) -> Tensor:
    if not 0 < shrink <= 1:
        raise InvalidInput(f"shrink is {shrink}; choose above 0 (0.1 is usual) and at most 1")
    covariance_LDD = torch.einsum("nld,nle->lde", centred_NLD, centred_NLD) / len(centred_NLD)
    level_L11 = covariance_LDD.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    mixed_LDD = (1 - shrink) * covariance_LDD + shrink * level_L11 * torch.eye(covariance_LDD.shape[-1])
    values_LD, vectors_LDD = torch.linalg.eigh(mixed_LDD)
    root_LDD: Tensor = vectors_LDD * values_LD.rsqrt()[:, None, :] @ vectors_LDD.transpose(1, 2)
    return root_LDD.float()


def _range(plain: Calibration, key: KeySpec, sample: Sample) -> Range:
    maker = KeyMaker(plain, key)
    bank_NK = torch.cat([maker.of_run(hidden)[1:] for hidden in sample.bank])
    unrelated_NK = torch.cat([maker.of_run(hidden)[1:] for hidden in sample.unrelated])
    matching_NK = torch.cat([maker.of_run(hidden, start=1)[_SKIPPED:] for hidden in sample.matching])
    lo = float((unrelated_NK @ bank_NK.T).amax(1).quantile(0.5))
    hi = float((matching_NK @ bank_NK.T).amax(1).quantile(0.999))
    return Range(lo, max(hi, lo + _MIN_GAP))
