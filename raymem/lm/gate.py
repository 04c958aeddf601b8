"""The trained gate that weighs memories against the model, query by query, by features of their answers.

Shape legend: Q queries, V vocabulary, k candidates, M memories, F features of one memory, E experts (a memory's answer
at several temperatures, M memories' one after another), G = 1 + E outputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from raymem.errors import Corrupt
from raymem.memory.learned import Learned
from raymem.types import Readout

GATES_FILE = "gates.json"
# where candidate scores are cosines, and where they are log-probabilities that a state gives to tokens
_COSINE_TAUS, _STATE_TAUS = (0.02, 0.05, 0.1, 0.2), (0.5, 1.0, 2.0, 4.0)
_COSINE_KINDS = frozenset({"spalm"})
FEATURES = 18
_LEAST = 1e-6


@dataclass(frozen=True)
class Gate:
    """Weights of the model's own prediction and of the experts of one or more memories, given their `features`.

    `kinds` M kinds of bank, `taus` E temperatures, as many for each of them; `mean_F` and `scale_F` standardise the
    M x 18 features; `weight_GF` and `bias_G` are those of a linear layer with G = 1 + E outputs, the model's own first.
    """

    kinds: tuple[str, ...]
    taus: tuple[float, ...]
    mean_F: Tensor
    scale_F: Tensor
    weight_GF: Tensor
    bias_G: Tensor

    def taus_of(self, memory: int) -> tuple[float, ...]:
        """The temperatures of one memory's experts."""
        each = len(self.taus) // len(self.kinds)
        return self.taus[memory * each : (memory + 1) * each]

    def log_weights(self, features_QF: Tensor, speaks_QM: Tensor | None = None) -> Tensor:
        """Logarithms `[Q, G]` of the mixture's weights, which sum to 1.

        Args:
            features_QF: of all memories, one after another.
            speaks_QM: bool, whether a memory has an answer; without one its experts weigh nothing. Default: all have.
        """
        standard_QF = (features_QF - self.mean_F) / self.scale_F
        if speaks_QM is None:
            return torch.log_softmax(standard_QF @ self.weight_GF.T + self.bias_G, dim=-1)
        silent_QM = ~speaks_QM
        standard_QF = standard_QF.masked_fill(silent_QM.repeat_interleave(FEATURES, 1), 0.0)
        silent_QE = silent_QM.repeat_interleave(len(self.taus) // len(self.kinds), 1)
        silent_QG = torch.nn.functional.pad(silent_QE, (1, 0), value=False)
        logits_QG = (standard_QF @ self.weight_GF.T + self.bias_G).masked_fill(silent_QG, float("-inf"))
        return torch.log_softmax(logits_QG, dim=-1)

    def to_json(self) -> dict[str, Any]:
        """The gate as plain data."""
        return {
            name: value.tolist() if isinstance(value, Tensor) else list(value) for name, value in vars(self).items()
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """The gate as tensors named `gate.…`, as `Learned` keeps them beside its kind."""
        parts = {name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)}
        parts["taus"] = torch.tensor(self.taus, dtype=torch.float64)
        return {f"gate.{name}": tensor for name, tensor in parts.items()}

    @staticmethod
    def of_learned(learned: Learned) -> Gate:
        """The gate among a bank's weights; `Mixer({learned.kind: gate})` reads with it.

        Raises:
            Corrupt: there is none, or its parts don't fit each other.
        """
        parts = {name.removeprefix("gate."): tensor.tolist() for name, tensor in learned.tensors.items()}
        return Gate.from_json(parts | {"kinds": [learned.kind]})

    @staticmethod
    def from_json(data: dict[str, Any]) -> Gate:
        """What `to_json` gave.

        Raises:
            Corrupt: parts are missing or don't fit each other.
        """
        try:
            tensors = {name: torch.tensor(data[name]) for name in ("mean_F", "scale_F", "weight_GF", "bias_G")}
            gate = Gate(kinds=tuple(data["kinds"]), taus=tuple(float(tau) for tau in data["taus"]), **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"not a gate ({error!r}): make it again with `python -m raymem.lm.tune`") from error
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        inputs, outputs = FEATURES * len(gate.kinds), 1 + len(gate.taus)
        if shapes != [(inputs,), (inputs,), (outputs, inputs), (outputs,)] or len(gate.taus) % len(gate.kinds):
            raise Corrupt(f"a gate's parts are {shapes}, which don't fit {inputs} features: make it again")
        return gate


@lru_cache
def shipped_gates() -> dict[str, Gate]:
    """The gates that come with raymem, by name: a kind of bank, or several joined by `+`."""
    data = json.loads(files("raymem.lm").joinpath(GATES_FILE).read_text())
    return {name: Gate.from_json(gate) for name, gate in data.items()}


def gate_name(kinds: Sequence[str]) -> str:
    """The name of the gate of banks of these kinds."""
    return "+".join(kinds)


def combined_kinds() -> tuple[str, ...]:
    """The kinds of bank that the shipped combined gate was trained with."""
    return next(gate.kinds for gate in shipped_gates().values() if len(gate.kinds) > 1)


def taus_of(kind: str) -> tuple[float, ...]:
    """The temperatures of the experts of one kind of bank."""
    return _COSINE_TAUS if kind in _COSINE_KINDS else _STATE_TAUS


def shares(scores_Qk: Tensor, taus: tuple[float, ...]) -> Tensor:
    """Each candidate's share `[Q, E, k]` of the memory's prediction at each temperature; 0 for an absent one."""
    least = torch.finfo(scores_Qk.dtype).min
    present_Qk = torch.isfinite(scores_Qk)
    scaled_QEk = scores_Qk.masked_fill(~present_Qk, least)[:, None] / torch.tensor(taus)[:, None].to(scores_Qk)
    return torch.softmax(scaled_QEk.clamp_min(least), dim=-1) * present_Qk[:, None]


class Prediction:
    """A model's next-token distributions: what a gate looks at, and any token's log-probability.

    Args:
        logits_QV: of any float dtype; log-probabilities are logits too.
    """

    def __init__(self, logits_QV: Tensor) -> None:
        self._logits_QV = logits_QV.float()
        probs_QV = torch.softmax(self._logits_QV, dim=1)
        self.best_Q = probs_QV.amax(1)
        self.norm_Q = self._logits_QV.amax(1) - self.best_Q.log()
        # a token that the model rules out has no share in the mean, and -inf times 0 is no number
        finite_QV = self._logits_QV.clamp_min(torch.finfo(torch.float32).min)
        self.entropy_Q = (self.norm_Q - torch.linalg.vecdot(probs_QV, finite_QV)).clamp_min(0.0)

    def log_probs(self, tokens_Qk: Tensor) -> Tensor:
        """Log-probabilities `[Q, k]` of some tokens of each row."""
        return self._logits_QV.gather(1, tokens_Qk) - self.norm_Q[:, None]


def features(own: Prediction, readout: Readout, taus: tuple[float, ...]) -> Tensor:
    """The gate's inputs `[Q, F]`: how near and how unanimous the candidates are, and whether the model agrees.

    Args:
        own: the model's distributions.
        readout: with candidate tokens.
        taus: the gate's; the second and third are looked at.
    """
    assert readout.tokens_Qk is not None
    assert readout.scores_Qk is not None
    tokens_Qk, scores_Qk = readout.tokens_Qk.clamp_min(0), readout.scores_Qk.float()
    present_Qk = torch.isfinite(scores_Qk)
    shares_QEk = shares(scores_Qk, taus[1:3])
    count_Qk, *masses = votes(tokens_Qk, torch.cat([present_Qk[:, None].float(), shares_QEk], 1)).unbind(1)
    own_Qk = own.log_probs(tokens_Qk).exp()
    covered_Q = (own_Qk * present_Qk / count_Qk.clamp_min(1)).sum(1)
    found = [readout.relevance_Q.float(), scores_Qk[:, 0], *_fall(scores_Qk, present_Qk)]
    found += [own.entropy_Q, own.best_Q, covered_Q, _log(covered_Q)]
    for share_Qk, mass_Qk in zip(shares_QEk.unbind(1), masses, strict=True):
        found += _agreement(share_Qk, mass_Qk, own_Qk)
    return torch.stack(found, dim=1)


def votes(tokens_Qk: Tensor, shares_QEk: Tensor) -> Tensor:
    """At each candidate, the sum of the shares of all candidates with its token, for each expert `[Q, E, k]`."""
    same_Qkk = tokens_Qk[:, :, None] == tokens_Qk[:, None, :]
    return shares_QEk @ same_Qkk.to(shares_QEk)


def _fall(scores_Qk: Tensor, present_Qk: Tensor) -> list[Tensor]:
    """How far the mean of the best 8 and of the best 32 lies below the best score."""
    above_Qk = (scores_Qk[:, :1] - scores_Qk).masked_fill(~present_Qk, 0.0)
    return [above_Qk[:, :n].sum(1) / present_Qk[:, :n].sum(1).clamp_min(1) for n in (8, 32)]


def _agreement(share_Qk: Tensor, mass_Qk: Tensor, own_Qk: Tensor) -> list[Tensor]:
    """The memory's favourite and its entropy, what the model expects of the memory, and of the favourite."""
    best_Q, at_Q = mass_Qk.max(1)
    entropy_Q = -(share_Qk * _log(mass_Qk)).sum(1)
    expected_Q = (share_Qk * own_Qk).sum(1)
    return [best_Q, entropy_Q, expected_Q, _log(expected_Q), _log(own_Qk.gather(1, at_Q[:, None])[:, 0])]


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(_LEAST).log()
