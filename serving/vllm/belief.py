"""Trust in a bank, request by request: rows come in pieces, come again after a rejected draft, and out of order.

Shape legend: Q consecutive rows of one request, V vocabulary, k candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from raymem.lm.trust import Trust, log_gains, weigh

# a rejected draft comes again, and between two pieces of a prompt that is scored come rows that vLLM samples from
_KEPT = 8
# vLLM drafts one token a step
_MAY_COME_AGAIN = 2


class Belief:
    """What one request has learned of one bank: the odds before its last rows, and what the next token would add.

    Args:
        candidates: at most so many tokens a row are made likelier by the bank than all the others.
    """

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates
        self._odds: dict[int, float] = {}
        self._gains: dict[int, tuple[Tensor, Tensor, float]] = {}

    def logits(self, own_QV: Tensor, mixed_QV: Tensor, start: int, tokens: list[int]) -> Tensor:
        """Log-probabilities `[Q, V]` of both, weighed by the odds before each row; rows that are the same stay so.

        Args:
            own_QV: logits without the bank.
            mixed_QV: and with it.
            start: the first row's position.
            tokens: the rows' input tokens, and the one after them if it is known.
        """
        trust, known = Trust(), len(tokens) - 1
        trust.log_odds = self._before(start, tokens[0], trust.log_odds)
        following = torch.tensor(tokens[1:], dtype=torch.int64, device=own_QV.device)
        gains_Q = torch.zeros(len(own_QV), device=own_QV.device)
        gains_Q[:known] = _losses(own_QV[:known], following) - _losses(mixed_QV[:known], following)
        odds_Q = trust.observe(gains_Q)
        late = slice(-_MAY_COME_AGAIN, None)
        self._keep(start + len(own_QV), odds_Q[late], own_QV[late], mixed_QV[late])
        if known == len(own_QV):
            self._put(start + known, trust.log_odds)
        return weigh(own_QV, mixed_QV, odds_Q)

    def _before(self, position: int, token: int, prior: float) -> float:
        """The odds before a row, whose token says how well the row before it did; without that, the latest before."""
        last = position - 1
        if last in self._odds and last in self._gains:
            tokens_k, gains_k, rest = self._gains[last]
            found = gains_k[tokens_k == token]
            return self._odds[last] + (float(found[0]) if len(found) else rest)
        earlier = [known for known in self._odds if known <= position]
        return self._odds[max(earlier)] if earlier else prior

    def _keep(self, end: int, odds_Q: Tensor, own_QV: Tensor, mixed_QV: Tensor) -> None:
        # what is no candidate loses the same share to the bank, so that the least gain is that of all the others
        gains_QV = log_gains(own_QV, mixed_QV)
        best = gains_QV.topk(min(self._candidates, gains_QV.shape[1]), dim=1)
        rest_Q, positions = gains_QV.amin(1).tolist(), range(end - len(odds_Q), end)
        for row, (position, log_odds) in enumerate(zip(positions, odds_Q.tolist(), strict=True)):
            self._put(position, log_odds)
            self._gains[position] = best.indices[row].cpu(), best.values[row].cpu(), rest_Q[row]

    def _put(self, position: int, log_odds: float) -> None:
        self._odds.pop(position, None)
        self._odds[position] = log_odds
        while len(self._odds) > _KEPT:
            oldest = next(iter(self._odds))
            del self._odds[oldest]
            self._gains.pop(oldest, None)


def _losses(logits_QV: Tensor, following_Q: Tensor) -> Tensor:
    return cross_entropy(logits_QV.float(), following_Q, reduction="none")
