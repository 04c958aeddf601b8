"""The same recurrence for a whole chunk at once: a triangular solve finds the errors, two products apply them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Transition(NamedTuple):
    """How the state after each of T steps is made of the state before them and of the T gradients.

    `M_t = decay_t M_0 + into_weight_t0 S_0 - sum_i into_weight_ti theta_i g_i`, and S_t alike with `into_momentum`
    and no M_0; index 0 of the last axis stands for S_0, index 1 + i for token i.
    """

    decay_BT: Tensor
    into_weight_BTI: Tensor
    into_momentum_BTI: Tensor


def transition(eta_BT: Tensor, alpha_BT: Tensor, active_BT: Tensor | None = None) -> Transition:
    """Coefficients of `S_t = eta S + u_t`, `M_t = (1 - alpha) M + S_t`; a row that is not active changes nothing."""
    if active_BT is not None:
        eta_BT, alpha_BT = torch.where(active_BT, eta_BT, 1.0), torch.where(active_BT, alpha_BT, 0.0)
    banks, steps = eta_BT.shape
    unit = torch.eye(1 + steps, dtype=eta_BT.dtype, device=eta_BT.device)
    momentum_BI = unit[0].expand(banks, -1)
    weight_BI = torch.zeros_like(momentum_BI)
    weights, momenta = [], []
    for t in range(steps):
        momentum_BI = eta_BT[:, t, None] * momentum_BI + unit[1 + t]
        added_BI = momentum_BI if active_BT is None else momentum_BI * active_BT[:, t, None]
        weight_BI = (1 - alpha_BT[:, t, None]) * weight_BI + added_BI
        weights.append(weight_BI)
        momenta.append(momentum_BI)
    return Transition((1 - alpha_BT).cumprod(1), torch.stack(weights, 1), torch.stack(momenta, 1))


def chunk_delta_update(
    weight_BKV: Tensor,
    momentum_BKV: Tensor | None,
    keys_BTK: Tensor,
    values_BTV: Tensor,
    theta_BT: Tensor,
    moves: Transition,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The recurrence of `recurrent_delta_update` over one chunk, exact up to rounding; differentiable in everything.

    Args:
        weight_BKV: `[B, K, V]` memory before the chunk.
        momentum_BKV: `[B, K, V]`, or None where eta is 0.
        keys_BTK: `[B, T, K]`.
        values_BTV: `[B, T, V]`.
        theta_BT: `[B, T]` step sizes, 0 for a row that is not active.
        moves: `transition(...)` of the other gates.

    Returns:
        Weight and momentum after the chunk, and each token's error before its own write `[B, T, V]`.

    Reference:
        Titans (2501.00663) equations 9, 10, 13; the WY form of the delta rule, extended to momentum (README.md).
    """
    step_B1T = 2 * theta_BT[:, None]
    # M_{t-1}: one row later than M_t, with M_0 itself before the first token
    decay_BT1 = torch.cat([torch.ones_like(moves.decay_BT[:, :1]), moves.decay_BT[:, :-1]], 1)[..., None]
    before_BTI = torch.cat([torch.zeros_like(moves.into_weight_BTI[:, :1]), moves.into_weight_BTI[:, :-1]], 1)
    known_BTV = decay_BT1 * (keys_BTK @ weight_BKV) - values_BTV
    if momentum_BKV is not None:
        known_BTV = known_BTV + before_BTI[..., :1] * (keys_BTK @ momentum_BKV)
    lower_BTT = before_BTI[..., 1:] * step_B1T * (keys_BTK @ keys_BTK.mT)
    errors_BTV = torch.linalg.solve_triangular(lower_BTT, known_BTV, upper=False, unitriangular=True)
    last_B1I, last_B11 = moves.into_weight_BTI[:, -1:], moves.decay_BT[:, -1:, None]
    after_BKV = last_B11 * weight_BKV - (keys_BTK * (last_B1I[..., 1:] * step_B1T).mT).mT @ errors_BTV
    if momentum_BKV is None:
        return after_BKV, None, errors_BTV
    after_BKV = after_BKV + last_B1I[..., :1] * momentum_BKV
    moment_B1I = moves.into_momentum_BTI[:, -1:]
    pushed_BKV = (keys_BTK * (moment_B1I[..., 1:] * step_B1T).mT).mT @ errors_BTV
    return after_BKV, moment_B1I[..., :1] * momentum_BKV - pushed_BKV, errors_BTV
