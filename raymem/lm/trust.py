"""The posterior belief that a bank helps with the text at hand, given its gains on the tokens already seen.

Shape legend: Q consecutive rows of one context, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PRIOR = 0.8


class Trust:
    """The posterior odds of "predictions with memory" against "predictions without", of one context and one bank.

    Bayes' rule over two experts: a wrong memory can't cost more than `-log(1 - prior)` nats in a whole context, 1.6
    by default, however wrong it is; a right one costs at most `-log(prior)`, 0.22. Each row is weighed by the tokens
    before it alone.

    Args:
        prior: belief at the start of the context, in (0, 1).
    """

    def __init__(self, prior: float = PRIOR) -> None:
        self.log_odds = math.log(prior / (1 - prior))

    def observe(self, gains_Q: Tensor) -> Tensor:
        """Log-odds `[Q]` that held before each row; the rows' own gains count from the next one on.

        Args:
            gains_Q: log-probability of the token that came, with memory minus without.
        """
        after_Q = self.log_odds + gains_Q.double().cumsum(0)
        before_Q = torch.cat([after_Q.new_full((1,), self.log_odds), after_Q])[:-1]
        if len(after_Q):
            self.log_odds = float(after_Q[-1])
        return before_Q

    def losses(self, own_Q: Tensor, mixed_Q: Tensor) -> Tensor:
        """What `logits` would lose `[Q]` on the tokens that came, in nats, at a fraction of its price.

        Args:
            own_Q: losses of the model alone.
            mixed_Q: losses of what `Mixer.logits` made of its logits.
        """
        log_odds_Q = self.observe(own_Q - mixed_Q).to(own_Q)
        return -torch.logaddexp(logsigmoid(log_odds_Q) - mixed_Q, logsigmoid(-log_odds_Q) - own_Q)

    def logits(self, own_QV: Tensor, mixed_QV: Tensor, following_Q: Tensor) -> Tensor:
        """Log-probabilities `[Q, V]` of both, weighed by the belief before each row; rows that are the same stay so.

        Args:
            own_QV: the model's logits.
            mixed_QV: what `Mixer.logits` made of them.
            following_Q: int64, the token that came after each row.
        """
        if mixed_QV is own_QV:
            return own_QV
        gains_Q = log_gains(own_QV, mixed_QV).gather(1, following_Q[:, None])[:, 0]
        return weigh(own_QV, mixed_QV, self.observe(gains_Q))


def log_gains(own_QV: Tensor, mixed_QV: Tensor) -> Tensor:
    """Log-probability `[Q, V]` of each token with memory minus without, of logits."""
    gains_QV = torch.log_softmax(mixed_QV.float(), dim=1) - torch.log_softmax(own_QV.float(), dim=1)
    # a token that the model rules out stays so
    return gains_QV.nan_to_num(nan=0.0)


def weigh(own_QV: Tensor, mixed_QV: Tensor, log_odds_Q: Tensor) -> Tensor:
    """Log-probabilities `[Q, V]` of both logits, mixed by the odds of the second; rows that are the same stay so."""
    own = torch.log_softmax(own_QV.float(), dim=1)
    mixed = torch.log_softmax(mixed_QV.float(), dim=1)
    log_odds_Q1 = log_odds_Q.to(own)[:, None]
    blended_QV = torch.logaddexp(mixed + logsigmoid(log_odds_Q1), own + logsigmoid(-log_odds_Q1))
    same_Q1 = (mixed_QV == own_QV).all(1, keepdim=True)
    return torch.where(same_Q1, own_QV.float(), blended_QV)
