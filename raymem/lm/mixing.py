"""Memory as a probability expert beside a frozen language model.

`p = w_0 p_model + sum_e w_e p_e`, where `p_e` is the candidates' shares at temperature `tau_e` summed by token, and the
weights come from a small trained gate; several memories share one gate, each with its own experts. Khandelwal et al.
2020 (arXiv 1911.00172) equation 3 with one expert and a constant weight.

All tokens but the candidates keep the model's probability times `w_0`. So a mixture is kept as the candidates and one
number a row, and the vocabulary is passed over only to normalise the model's logits and to shift them.

Shape legend: R rows of logits, Q queries, V vocabulary, k candidates of all memories, M memories, E experts, G = 1 + E.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from raymem.errors import InvalidInput
from raymem.lm.gate import Gate, Prediction, features, gate_name, shares, shipped_gates, votes
from raymem.types import Readout

# candidates a query: the gate was trained on so many; fewer work, and help less
NEIGHBOURS = 128


@dataclass(frozen=True)
class Mixture:
    """Next-token distributions of a model and its memories together, of the rows that a memory answered.

    Args:
        rows_Q: int64, which rows of the logits these are.
        norm_Q: log-sum-exp of the model's own logits.
        rest_Q: what memory adds to the log-probability of every token that is no candidate, 0 at most.
        tokens_Qk: int64 candidates, all of them tokens; one may be there more than once, with the same entries.
        own_Qk: their log-probabilities without memory.
        mixed_Qk: and with it.
    """

    rows_Q: Tensor
    norm_Q: Tensor
    rest_Q: Tensor
    tokens_Qk: Tensor
    own_Qk: Tensor
    mixed_Qk: Tensor

    def logits(self, logits_RV: Tensor) -> Tensor:
        """The model's logits, and in this mixture's rows its log-probabilities: a new float32 tensor.

        Other rows keep their values bit for bit.
        """
        mixed_RV = logits_RV.to(torch.float32, copy=True)
        self.put(mixed_RV)
        return mixed_RV

    def put(self, logits_RV: Tensor) -> None:
        """Change the model's logits, float32, to what `logits` returns, in place."""
        shift_R = logits_RV.new_zeros(len(logits_RV))
        shift_R[self.rows_Q] = self.rest_Q - self.norm_Q
        logits_RV += shift_R[:, None]
        logits_RV[self.rows_Q[:, None], self.tokens_Qk] = self.mixed_Qk

    def gains(self) -> Tensor:
        """What memory adds to each candidate's log-probability `[Q, k]`."""
        # a token that the model rules out can't have come by its own choice: it says nothing of the memory
        return (self.mixed_Qk - self.own_Qk).nan_to_num(nan=0.0, posinf=0.0)

    def gains_of(self, following_Q: Tensor) -> Tensor:
        """What memory adds to the log-probability of one token a row `[Q]`."""
        same_Qk = self.tokens_Qk == following_Q[:, None]
        found_Q = self.gains().gather(1, same_Qk.int().argmax(1)[:, None])[:, 0]
        return torch.where(same_Qk.any(1), found_Q, self.rest_Q)

    def weighed(self, log_odds_Q: Tensor) -> Mixture:
        """The mixture of this one with the model alone, at these odds of this one being right."""
        with_Q, without_Q = (logsigmoid(odds_Q).to(self.rest_Q) for odds_Q in (log_odds_Q, -log_odds_Q))
        mixed_Qk = torch.logaddexp(self.mixed_Qk + with_Q[:, None], self.own_Qk + without_Q[:, None])
        return replace(self, rest_Q=torch.logaddexp(self.rest_Q + with_Q, without_Q), mixed_Qk=mixed_Qk)

    def of(self, some: slice) -> Mixture:
        """The mixture of some of its rows."""
        return Mixture(*(column[some] for column in vars(self).values()))


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
        found = self.mix(logits_QV, answers)
        return logits_QV if found is None else found.logits(logits_QV)

    def mix(self, logits_QV: Tensor, answers: Readout | Sequence[Readout]) -> Mixture | None:
        """As `logits`, but only where the distribution differs from the model's; None where no row does."""
        readouts = [answers] if isinstance(answers, Readout) else list(answers)
        speaks_QM = torch.stack([self._speaks(logits_QV, readout) for readout in readouts], dim=1)
        rows_Q = speaks_QM.any(1).nonzero()[:, 0]
        if not len(rows_Q):
            return None
        gate = self._gate([readout.kind for readout in readouts])
        if len(rows_Q) < len(logits_QV):
            logits_QV, speaks_QM = logits_QV[rows_Q], speaks_QM[rows_Q]
            readouts = [select(readout, rows_Q) for readout in readouts]
        own = Prediction(logits_QV)
        found = evidence(own, readouts, [gate.taus_of(memory) for memory in range(len(readouts))])
        return mixture(own, found, gate.log_weights(found.features_QF, speaks_QM), rows_Q)

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


def evidence(own: Prediction, readouts: Sequence[Readout], taus: Sequence[tuple[float, ...]]) -> Evidence:
    """The answers of one or more memories, ready for a gate and a mixture.

    Args:
        own: the model's own distributions.
        readouts: of M memories; a readout without any candidates adds nothing.
        taus: temperatures of each memory's experts.
    """
    tokens, found, seen = [], [], []
    for readout, own_taus in zip(map(_with_candidates, readouts), taus, strict=True):
        assert readout.tokens_Qk is not None
        assert readout.scores_Qk is not None
        tokens.append(readout.tokens_Qk)
        found.append(shares(readout.scores_Qk.float(), own_taus))
        seen.append(features(own, readout, own_taus))
    return Evidence(torch.cat(tokens, 1), _side_by_side(found), torch.cat(seen, 1))


def mixture(own: Prediction, found: Evidence, log_weights_QG: Tensor, rows_Q: Tensor | None = None) -> Mixture:
    """The weighted mixture of the model and E experts, combined in log space.

    Args:
        own: the model's own distributions, of Q rows.
        found: the experts'; each row has a candidate, and its shares sum to 1.
        log_weights_QG: logarithms of the G = 1 + E weights, the model's first.
        rows_Q: which rows of the logits these are. Default: the first Q.
    """
    share_Qk = (log_weights_QG[:, 1:, None].exp() * found.shares_QEk).sum(1)
    # an absent candidate stands for one that is there, and adds nothing to it
    there_Q1 = (found.tokens_Qk >= 0).int().argmax(1, keepdim=True)
    tokens_Qk = torch.where(found.tokens_Qk >= 0, found.tokens_Qk, found.tokens_Qk.gather(1, there_Q1))
    own_Qk, rest_Q = own.log_probs(tokens_Qk), log_weights_QG[:, 0]
    memory_Qk = votes(tokens_Qk, share_Qk[:, None])[:, 0]
    return Mixture(
        rows_Q=torch.arange(len(tokens_Qk), device=tokens_Qk.device) if rows_Q is None else rows_Q,
        norm_Q=own.norm_Q,
        rest_Q=rest_Q,
        tokens_Qk=tokens_Qk,
        own_Qk=own_Qk,
        mixed_Qk=torch.logaddexp(own_Qk + rest_Q[:, None], memory_Qk.log()),
    )


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
