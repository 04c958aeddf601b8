"""Memory as a probability expert beside a frozen language model.

`p = w_0 p_model + sum_e w_e p_e`, where `p_e` is the candidates' shares at temperature `tau_e` summed by token, and the
weights come from a small trained gate. Khandelwal et al. 2020 (arXiv 1911.00172) equation 3 with one expert and a
constant weight.

Shape legend: Q queries, V vocabulary, k candidates, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raymem.errors import InvalidInput
from raymem.lm.gate import Gate, family_of, features, shares, shipped_gates
from raymem.types import Readout

# candidates a query: the gate was trained on so many; fewer work, and help less
NEIGHBOURS = 128


class Mixer:
    """Mixes what a bank answered into a model's next-token logits; stateless, cheap, and exact where memory is silent.

    Args:
        gates: by family of bank, `rows` and `states`; those that come with raymem by default.
        strict: a query of relevance 0 keeps its logits bit for bit. Otherwise relevance is one of the things that the
            gate weighs: half of all unrelated queries have 0, but so has many a query that memory helps.
    """

    def __init__(self, gates: Mapping[str, Gate] | None = None, *, strict: bool = False) -> None:
        self._gates = shipped_gates() if gates is None else gates
        self._strict = strict

    def logits(self, logits_QV: Tensor, readout: Readout) -> Tensor:
        """New logits (normalised log-probabilities, float32) for the queries that the bank has something to say about.

        Rows without candidates keep their logits bit for bit, and the very same tensor comes back when that is so for
        all: an empty bank changes nothing.

        Args:
            logits_QV: the model's own, any float dtype.
            readout: what a bank answered to the same Q queries.

        Raises:
            InvalidInput: another number of queries, or a token beyond the vocabulary.
        """
        speaks_Q = self._speaks(logits_QV, readout)
        if not bool(speaks_Q.any()):
            return logits_QV
        asked = select(readout, speaks_Q)
        mixed_QV = logits_QV.to(torch.float32, copy=True)
        mixed_QV[speaks_Q] = self._mix(torch.log_softmax(mixed_QV[speaks_Q], dim=-1), asked)
        return mixed_QV

    def _mix(self, log_probs_QV: Tensor, readout: Readout) -> Tensor:
        assert readout.tokens_Qk is not None
        assert readout.scores_Qk is not None
        gate = self._gates[family_of(readout)]
        weights_QG = gate.log_weights(features(log_probs_QV, readout, gate.taus))
        return mixture(log_probs_QV, readout.tokens_Qk, shares(readout.scores_Qk.float(), gate.taus), weights_QG)

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
