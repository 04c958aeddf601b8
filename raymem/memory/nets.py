"""The network whose weights are a Titans memory: its outputs, and each token's gradient, batched over banks.

Shape legend: `B` banks, `T` rows, `I` and `O` a layer's widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

from raymem.kernels.delta_update import Transition

_LAYER_NORM_EPS = 1e-5

Weights = list[Tensor]


class Signals(NamedTuple):
    """A token's gradient of layer l is the outer product of `inputs[l]` [B, T, I] and `deltas[l]` [B, T, O]."""

    inputs: list[Tensor]
    deltas: list[Tensor]


def forward(weights: Weights, keys_BTK: Tensor, *, residual_norm: bool) -> Tensor:
    """What the network puts out [B, T, V]: `W_L gelu(... gelu(k W_1))`, and `LN(that) + k` with `residual_norm`."""
    hidden = keys_BTK
    for layer, weight in enumerate(weights):
        hidden = (gelu(hidden) if layer else hidden) @ weight
    return _normalised(hidden)[0] + keys_BTK if residual_norm else hidden


def signals(weights: Weights, keys_BTK: Tensor, slope: Callable[[Tensor], Tensor], *, residual_norm: bool) -> Signals:
    """Each token's own backward pass, from the loss's slope in the outputs.

    It is written out, so that it can be differentiated again and runs without autograd.
    """
    inputs, sums = [keys_BTK], [keys_BTK @ weights[0]]
    for weight in weights[1:]:
        inputs.append(gelu(sums[-1]))
        sums.append(inputs[-1] @ weight)
    if residual_norm:
        unit, spread = _normalised(sums[-1])
        rise = slope(unit + keys_BTK)
        deltas = [(rise - rise.mean(-1, keepdim=True) - unit * (rise * unit).mean(-1, keepdim=True)) / spread]
    else:
        deltas = [slope(sums[-1])]
    for weight, before in zip(reversed(weights[1:]), reversed(sums[:-1]), strict=True):
        deltas.append(deltas[-1] @ weight.mT * _gelu_slope(before))
    return Signals(inputs, deltas[::-1])


def clipped(theta_BT: Tensor, found: Signals, limit: float) -> Tensor:
    """Step sizes that shorten each token's gradient to norm `limit` at most, and leave smaller ones as they are."""
    layers = zip(found.inputs, found.deltas, strict=True)
    square_BT = torch.stack([a.square().sum(-1) * d.square().sum(-1) for a, d in layers]).sum(0)
    # the root has an infinite gradient at zero: the clamp avoids it where no step is clipped
    return theta_BT * (limit / square_BT.clamp_min(limit * limit).sqrt())


def chunk_step(
    weights: Weights,
    momenta: Weights | None,
    found: Signals,
    theta_BT: Tensor,
    moves: Transition,
    *,
    push: bool = True,
) -> tuple[Weights, Weights | None]:
    """Weights and momenta after a chunk whose gradients were all taken at its first weights.

    Without gradients the storage given is reused. `push=False` leaves the momenta as they were, for a look ahead.

    Reference:
        Titans (2501.00663) section 3.2; with momentum
        `M_T = beta_T M_0 - sum_t theta_t g_t sum_{j>=t} (beta_T / beta_j) prod_{i=t+1..j} eta_i`.
    """
    into_weight, into_momentum = moves.into_weight_BTI[:, -1], moves.into_momentum_BTI[:, -1]
    decay_B11 = moves.decay_BT[:, -1, None, None]
    after: Weights = []
    pushed: Weights = []
    for layer, (source, delta) in enumerate(zip(found.inputs, found.deltas, strict=True)):
        momentum = None if momenta is None else momenta[layer]
        share = (theta_BT * into_weight[:, 1:])[..., None]
        kept = _mixed(weights[layer], decay_B11, momentum, into_weight[:, :1, None])
        after.append(_descended(kept, source * share, delta))
        if momentum is not None and push:
            share = (theta_BT * into_momentum[:, 1:])[..., None]
            kept = _mixed(momentum, into_momentum[:, :1, None], None, decay_B11)
            pushed.append(_descended(kept, source * share, delta))
    return after, pushed if push and momenta is not None else momenta


def _mixed(weight: Tensor, decay: Tensor, momentum: Tensor | None, share: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return decay * weight if momentum is None else decay * weight + share * momentum
    weight.mul_(decay)
    return weight if momentum is None else weight.addcmul_(momentum, share)


def _descended(weight: Tensor, source: Tensor, delta: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return torch.baddbmm(weight, source.mT, delta, alpha=-1)
    return weight.baddbmm_(source.mT, delta, alpha=-1)


def _normalised(hidden: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(hidden, dim=-1, correction=0, keepdim=True)
    spread = (variance + _LAYER_NORM_EPS).sqrt()
    return (hidden - mean) / spread, spread


def _gelu_slope(x: Tensor) -> Tensor:
    below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
