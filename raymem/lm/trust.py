"""The posterior belief that a bank helps with the text at hand, given its gains on the tokens already seen.

Shape legend: Q consecutive rows of one context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        """What the mixture of both loses `[Q]` on the tokens that came, in nats: `Mixture.weighed` by these odds.

        Args:
            own_Q: losses of the model alone.
            mixed_Q: losses of what `Mixer.logits` made of its logits.
        """
        log_odds_Q = self.observe(own_Q - mixed_Q).to(own_Q)
        return -torch.logaddexp(logsigmoid(log_odds_Q) - mixed_Q, logsigmoid(-log_odds_Q) - own_Q)


class FixedShare:
    """Several predictors of one context, weighed by how they did on its tokens so far; which is best may change.

    After each token the weights are updated by Bayes' rule, and a share of them goes back to the priors (Herbster and
    Warmuth 1998, the fixed-share update, with the priors as its pool). It loses at most `-log q` more in a context than
    the predictor of prior q, and `-log(1 - share)` a token.

    Args:
        priors: of each of E predictors, summing to 1.
        share: of the weights that is given back, in [0, 1).
    """

    def __init__(self, priors: Sequence[float], share: float) -> None:
        self._share = share
        self._log_priors_E = torch.tensor(priors, dtype=torch.float64).log()
        self._log_weights_E = self._log_priors_E

    def losses(self, losses_EQ: Tensor) -> Tensor:
        """What the weighed predictors lose `[Q]` on the tokens that came, in nats; each is weighed by those before."""
        mixed: list[Tensor] = []
        for losses_E in losses_EQ.double().T:
            joint_E = self._log_weights_E - losses_E
            total = torch.logsumexp(joint_E, 0)
            mixed.append(-total)
            back_E = self._log_priors_E + (math.log(self._share) if self._share else -math.inf)
            self._log_weights_E = torch.logaddexp(joint_E - total + math.log1p(-self._share), back_E)
        return torch.stack(mixed).to(losses_EQ) if mixed else losses_EQ.new_zeros(0)
