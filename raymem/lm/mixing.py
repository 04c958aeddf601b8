"""Memory as a probability expert beside a frozen language model.

`p = w_0 p_model + sum_e w_e p_e`, where `p_e` is the candidates' shares at temperature `tau_e` summed by token, and the
weights come from a small trained gate; several memories share one gate, each with its own experts. Khandelwal et al.
2020 (arXiv 1911.00172) equation 3 with one expert and a constant weight.

Shape legend: Q queries, V vocabulary, k candidates of all memories, M memories, E experts, G = 1 + E.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from raymem.errors import InvalidInput
from raymem.lm.gate import Gate, features, gate_name, shares, shipped_gates
from raymem.types import Readout

# candidates a query: the gate was trained on so many; fewer work, and help less
NEIGHBOURS = 128


class Mixer:
    """Mixes the answers of banks into a model's next-token logits; stateless, and exact where a bank has no candidates.

    Args:
        gates: by kind of bank, or by several kinds joined by `+`; those that come with raymem by default.
        strict: a query of relevance 0 keeps its logits bit for bit. Otherwise relevance is one of the things that the
            gate weighs: half of all unrelated queries have 0, but so has many a query that memory helps.
    """

    def __init__(self, gates: Mapping[str, Gate] | None = None, *, strict: bool = False) -> None:
        self._gates = shipped_gates() if gates is None else gates
        self._strict = strict

    def logits(self, logits_QV: Tensor, answers: Readout | Sequence[Readout]) -> Tensor:
        """New logits (normalised log-probabilities, float32) for the queries for which a bank has candidates.

        Rows without candidates keep their logits bit for bit, and the very same tensor comes back when that is so for
        all: an empty bank changes nothing.

        Args:
            logits_QV: the model's own, any float dtype.
            answers: what a bank, or several behind one gate, answered to the same Q queries.

        Raises:
            InvalidInput: another number of queries, a token beyond the vocabulary, or kinds without a gate.
        """
        readouts = [answers] if isinstance(answers, Readout) else list(answers)
        speaks_QM = torch.stack([self._speaks(logits_QV, readout) for readout in readouts], dim=1)
        speaks_Q = speaks_QM.any(1)
        if not bool(speaks_Q.any()):
            return logits_QV
        gate = self._gate([readout.kind for readout in readouts])
        asked = [select(readout, speaks_Q) for readout in readouts]
        mixed_QV = logits_QV.to(torch.float32, copy=True)
        log_probs_QV = torch.log_softmax(mixed_QV[speaks_Q], dim=-1)
        found = evidence(log_probs_QV, asked, [gate.taus_of(memory) for memory in range(len(asked))])
        weights_QG = gate.log_weights(found.features_QF, speaks_QM[speaks_Q])
        mixed_QV[speaks_Q] = mixture(log_probs_QV, found.tokens_Qk, found.shares_QEk, weights_QG)
        return mixed_QV

    def _gate(self, kinds: list[str]) -> Gate:
        gate = self._gates.get(gate_name(kinds))
        if gate is None:
            raise InvalidInput(
                f"no gate for {gate_name(kinds) or 'no'!r} banks; there are gates for {', '.join(self._gates)}: "
                "read banks of those, or train a gate with `python -m raymem.lm.tune`"
            )
        return gate

    def _speaks(self, logits_QV: Tensor, readout: Readout) -> Tensor:
        tokens_Qk, scores_Qk = readout.tokens_Qk, readout.scores_Qk
        if len(readout.relevance_Q) != len(logits_QV):
            raise InvalidInput(
                f"{len(logits_QV)} rows of logits and a readout of {len(readout.relevance_Q)} queries: "
                "read with the states that made these logits"
            )
        if tokens_Qk is None or scores_Qk is None or not tokens_Qk.numel():
            return torch.zeros(len(logits_QV), dtype=torch.bool, device=logits_QV.device)
        if int(tokens_Qk.max()) >= logits_QV.shape[1]:
            raise InvalidInput(
                f"the bank holds token {int(tokens_Qk.max())}, the logits have {logits_QV.shape[1]}: another tokenizer"
            )
        speaks_Q = torch.isfinite(scores_Qk).any(1)
        return speaks_Q & (readout.relevance_Q > 0) if self._strict else speaks_Q


class Evidence(NamedTuple):
    """The memories' answers: candidates `tokens_Qk`, the experts' `shares_QEk` in them, `features_QF` for a gate."""

    tokens_Qk: Tensor
    shares_QEk: Tensor
    features_QF: Tensor


def evidence(log_probs_QV: Tensor, readouts: Sequence[Readout], taus: Sequence[tuple[float, ...]]) -> Evidence:
    """The answers of one or more memories, ready for a gate and a mixture.

    Args:
        log_probs_QV: the model's own, float32.
        readouts: of M memories; a readout without any candidates adds nothing.
        taus: temperatures of each memory's experts.
    """
    tokens, found, seen = [], [], []
    for readout, own_taus in zip(map(_with_candidates, readouts), taus, strict=True):
        assert readout.tokens_Qk is not None
        assert readout.scores_Qk is not None
        tokens.append(readout.tokens_Qk)
        found.append(shares(readout.scores_Qk.float(), own_taus))
        seen.append(features(log_probs_QV, readout, own_taus))
    return Evidence(torch.cat(tokens, 1), _side_by_side(found), torch.cat(seen, 1))


def mixture(log_probs_QV: Tensor, tokens_Qk: Tensor, shares_QEk: Tensor, log_weights_QG: Tensor) -> Tensor:
    """Log-probabilities `[Q, V]` of the weighted mixture of the model and E experts, combined in log space.

    Args:
        log_probs_QV: the model's own, normalised.
        tokens_Qk: int64 candidates; those without any share may be -1.
        shares_QEk: of each expert, summing to 1 over the candidates.
        log_weights_QG: logarithms of the G = 1 + E weights, the model's first.
    """
    share_Qk = (log_weights_QG[:, 1:, None].exp() * shares_QEk).sum(1)
    memory_QV = torch.zeros_like(log_probs_QV).scatter_add_(1, tokens_Qk.clamp_min(0), share_Qk)
    return torch.logaddexp(log_probs_QV + log_weights_QG[:, :1], memory_QV.log())


def select(readout: Readout, rows_Q: Tensor) -> Readout:
    """The readout of some of its queries, by mask or index."""
    parts = {name: value[rows_Q] for name, value in vars(readout).items() if isinstance(value, Tensor)}
    return Readout(**(vars(readout) | parts))


def _side_by_side(shares_QEk: Sequence[Tensor]) -> Tensor:
    """Several memories' shares as one tensor `[Q, all E, all k]`: an expert has none in another memory's candidates."""
    widths = [part.shape[-1] for part in shares_QEk]
    placed, before = [], 0
    for part, width in zip(shares_QEk, widths, strict=True):
        placed.append(pad(part, (before, sum(widths) - before - width)))
        before += width
    return torch.cat(placed, 1)


def _with_candidates(readout: Readout) -> Readout:
    if readout.tokens_Qk is not None and readout.scores_Qk is not None and readout.tokens_Qk.numel():
        return readout
    nothing_Q1 = torch.full_like(readout.relevance_Q[:, None], float("-inf"))
    return replace(readout, tokens_Qk=torch.full_like(nothing_Q1, -1, dtype=torch.int64), scores_Qk=nothing_Q1)
