"""Fitting the gate that weighs a bank's rows against a model, on the next tokens of the bank's own text.

Yogatama et al. 2021 (arXiv 2102.02557) train a gate with the model frozen; here it is the gate of raymem/lm/gate.py,
which weighs the model's answer against the neighbours' at several temperatures. The first rows are memory; the tokens
after them are read again in windows that see nothing earlier, as another agent would, and the gate learns from those.

Shape legend: `N` predictions, `F` features, `E` temperatures, `G = 1 + E`, `W` rows of a window, `k` neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from raymem.encode.encoder import Encoder
from raymem.encode.keys import ContextRows
from raymem.errors import InvalidInput
from raymem.lm.gate import Gate, Prediction, features, shares, shipped_gates, taus_of
from raymem.lm.mixing import NEIGHBOURS
from raymem.lm.models import Pass
from raymem.memory.base import Memory
from raymem.storage.journal.journal import Journal
from raymem.train.data import Lessons, part_of
from raymem.train.loop import Task
from raymem.types import Readout

# the share of the training rows that fill the memory; the gate learns on the rest
_MEMORY_SHARE = 0.75
_WINDOW, _LEAST_WINDOW = 256, 16
_BATCH = 512
_NEAR = 1e-3
_FIXED = tuple(n / 20 for n in range(1, 20))


class TrainingModel(Protocol):
    """What training needs of a language model."""

    def run_cached(self, tokens_T: Tensor, layers: tuple[int, ...]) -> Pass: ...
    def logits(self, final_Td: Tensor) -> Tensor: ...


class Predictions(NamedTuple):
    """`features_NF` that the gate sees, `found_NE` each temperature's probability of the token that came, and `own_N`
    the model's log-probability of it.
    """

    features_NF: Tensor
    found_NE: Tensor
    own_N: Tensor


@dataclass(frozen=True)
class GateSetup:
    """A model and a memory that read a bank's tokens again."""

    memory: Memory
    encoder: Encoder
    model: TrainingModel
    journal: Journal
    layers: tuple[int, ...]
    sources: list[tuple[str, str]]


class SpalmTask(Task):
    """The gate's linear layer, which starts as the one that comes with raymem and is held near it.

    That one has seen what a wrong memory looks like; a bank's own journal can't show it.
    """

    metric = "perplexity of tokens read again without their context; lower is better"

    def __init__(self, setup: GateSetup, lessons: Lessons) -> None:
        self._gate = shipped_gates()["spalm"]
        memory_rows = int(lessons.split * _MEMORY_SHARE)
        with torch.no_grad():
            state = setup.memory.absorb(setup.memory.empty(), part_of(lessons.rows, 0, memory_rows))
            self._own = _predicted(setup, state, lessons, memory_rows, lessons.split)
            self._held = _predicted(setup, state, lessons, lessons.split, len(lessons.rows))
        self._weight_GF = self._gate.weight_GF.clone().requires_grad_()
        self._bias_G = self._gate.bias_G.clone().requires_grad_()

    def weights(self) -> dict[str, Tensor]:
        """See Task."""
        return {"weight": self._weight_GF, "bias": self._bias_G}

    def loss(self, generator: torch.Generator) -> Tensor:
        """See Task."""
        some_N = torch.randint(len(self._own.own_N), (_BATCH,), generator=generator)
        moved = (self._weight_GF - self._gate.weight_GF).square().sum()
        return _surprise(self.gate, Predictions(*(part[some_N] for part in self._own))) + _NEAR * moved

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """See Task; the fixed weight is the best that there is for the held-out tokens themselves."""
        held = self._held
        fixed = [
            -torch.logaddexp(held.own_N + math.log(1 - weight), (weight * found_N).clamp_min(1e-30).log()).mean()
            for weight in _FIXED
            for found_N in held.found_NE.unbind(1)
        ]
        return {
            "trained": float(_surprise(self.gate, held).exp()),
            "shipped gate": float(_surprise(self._gate, held).exp()),
            "best fixed weight": float(torch.stack(fixed).min().exp()),
            "model alone": float((-held.own_N.mean()).exp()),
        }

    def learned(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """See Task."""
        return self.gate.to_tensors(), {}

    @property
    def gate(self) -> Gate:
        """The gate with its present weights."""
        return replace(self._gate, weight_GF=self._weight_GF, bias_G=self._bias_G)


def _surprise(gate: Gate, seen: Predictions) -> Tensor:
    logs_NG = torch.cat([seen.own_N[:, None], seen.found_NE.clamp_min(1e-12).log()], 1)
    return -torch.logsumexp(logs_NG + gate.log_weights(seen.features_NF), 1).mean()


def _predicted(setup: GateSetup, state: Any, lessons: Lessons, start: int, stop: int) -> Predictions:
    """Predictions of model and memory for the tokens of rows [start, stop)."""
    found = [_window(setup, state, tokens_T) for tokens_T in _windows(setup, lessons, start, stop)]
    if not found:
        raise InvalidInput(
            f"rows {start} to {stop} hold no {_LEAST_WINDOW} tokens of one run in a row, which a gate learns from: "
            "write longer runs to the bank"
        )
    return Predictions(*(torch.cat(part) for part in zip(*found, strict=True)))


def _windows(setup: GateSetup, lessons: Lessons, start: int, stop: int) -> Iterator[Tensor]:
    rows = part_of(lessons.rows, start, stop)
    for source in sorted(set(rows.source_N.tolist())):
        seq_N = rows.seq_N[rows.source_N == source]
        first, last = int(seq_N.min()), int(seq_N.max()) + 2
        stream, run = setup.sources[source]
        tokens_T = setup.journal.tokens(stream, run, first, last)
        # across a gap the tokens before did not lead to those after
        if len(tokens_T) == last - first:
            yield from (part for part in torch.split(tokens_T, _WINDOW) if len(part) >= _LEAST_WINDOW)


def _window(setup: GateSetup, state: Any, tokens_T: Tensor) -> Predictions:
    done, targets_W = setup.model.run_cached(tokens_T, setup.layers), tokens_T[1:]
    found = setup.memory.lookup(state, setup.encoder.keys([ContextRows(done.hidden_TLd[:-1], 0)]), NEIGHBOURS)
    readout = Readout(
        found.values_QV, setup.encoder.relevance(found.similarity_Q), found.tokens_Qk, found.scores_Qk, found.pos_Qk
    )
    own = Prediction(setup.model.logits(done.final_Td[:-1]))
    hit_W1k = (found.tokens_Qk == targets_W[:, None])[:, None]
    taus = taus_of(setup.memory.kind)
    found_WE = (shares(found.scores_Qk.float(), taus) * hit_W1k).sum(-1)
    own_W = own.log_probs(targets_W[:, None])[:, 0]
    return Predictions(features(own, readout, taus), found_WE, own_W)
