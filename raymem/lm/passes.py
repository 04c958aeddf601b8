"""A frozen model's passes over a document: one over all of it, and one over each window alone.

The writing pass is a single causal pass over the document's start, as an agent reads it: each written row's state
depends on all tokens before it, up to 3,072. A window's pass sees nothing before the window.

Shape legend: T tokens of a document, W rows of a window with a known next token, L layers, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from raymem.lm.models import LanguageModel, Pass
from raymem.lm.text import Document, Split, TokenRange, chunks, split

if TYPE_CHECKING:
    from raymem.encode.calibration import Calibration

CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Window:
    """Rows of a window before each of its targets: states [W, L, d], final states [W, d], targets [W]."""

    span: TokenRange
    hidden_WLd: Tensor
    final_Wd: Tensor
    targets_W: Tensor


@dataclass(frozen=True)
class Reading:
    """A document as a model read it; `whole` is the pass over all of it."""

    name: str
    split: Split
    whole: Pass
    windows: tuple[Window, ...]

    @property
    def written_TLd(self) -> Tensor:
        """States of the rows to write."""
        return self.whole.hidden_TLd[: self.split.written]


def read(model: LanguageModel, document: Document, layers: Sequence[int], max_tokens: int, window: int) -> Reading:
    """Pass a document and its windows through a model.

    Raises:
        InvalidInput: the document, or a window behind retrieved text, has more tokens than the model has positions for.
    """
    # every tokenizer makes at least one token of 64 characters of plain text: later characters are not needed
    parts = split(document.name, model.encode(document.text[: max_tokens * 64]), max_tokens, window)
    model.check_length(len(parts.tokens_T), f"document {document.name!r} (--max-tokens sets how much is read)")
    windows = []
    for span in parts.windows:
        ids_T = parts.tokens_T[slice(*span)]
        done = model.run_cached(ids_T, layers)
        windows.append(Window(span, done.hidden_TLd[:-1], done.final_Td[:-1], ids_T[1:]))
    return Reading(document.name, parts, model.run_cached(parts.tokens_T, layers), tuple(windows))


def full_context_losses(model: LanguageModel, reading: Reading, window: Window) -> Tensor:
    """Losses [W] of a window's targets when the model sees the whole document before them."""
    rows = slice(window.span.start, window.span.stop - 1)
    return losses(model.logits(reading.whole.final_Td[rows]), window.targets_W)


def retrieval_losses(
    model: LanguageModel, reading: Reading, window: Window, calibration: Calibration, pieces: int
) -> Tensor:
    """Losses [W] of a window's targets behind a prompt of the written chunks that are most like the window.

    Likeness is the cosine of mean hidden states of chunk and whole window: it knows the text to be predicted, which
    flatters retrieval.
    """
    prompt_T = torch.cat(
        [reading.split.tokens_T[start:stop] for start, stop in _best(reading, window, calibration, pieces)]
    )
    ids_T = torch.cat([prompt_T, reading.split.tokens_T[slice(*window.span)]])
    final_Td = model.run_cached(ids_T, calibration.layers).final_Td
    return losses(model.logits(final_Td[len(prompt_T) : -1]), window.targets_W)


def losses(logits_WV: Tensor, targets_W: Tensor) -> Tensor:
    """Negative log-likelihoods [W], in nats, computed in float32."""
    return cross_entropy(logits_WV.float(), targets_W, reduction="none")


def _best(reading: Reading, window: Window, calibration: Calibration, pieces: int) -> list[TokenRange]:
    spans = chunks(reading.split.written, CHUNK_TOKENS)
    asked_K = _mean_state(window.hidden_WLd[1:], calibration)
    likeness = [float(_mean_state(reading.whole.hidden_TLd[max(1, a) : b], calibration) @ asked_K) for a, b in spans]
    order = sorted(range(len(spans)), key=lambda index: -likeness[index])
    return [spans[index] for index in sorted(order[:pieces])]


def _mean_state(hidden_TLd: Tensor, calibration: Calibration) -> Tensor:
    mean_K = (hidden_TLd.float().mean(0) - calibration.mean_LD).flatten()
    unit_K: Tensor = mean_K / mean_K.norm().clamp_min(1e-12)
    return unit_K
