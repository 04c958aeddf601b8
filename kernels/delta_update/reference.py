"""The Titans recurrence of a linear memory, one token at a time, in plain torch: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_delta_update_reference(
    weight_BKV: Tensor,
    momentum_BKV: Tensor | None,
    keys_BTK: Tensor,
    values_BTV: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    active_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `recurrent_delta_update` computes; differentiable in everything."""
    theta_BT, eta_BT, alpha_BT = gates
    errors = []
    for t in range(keys_BTK.shape[1]):
        key_BK1 = keys_BTK[:, t, :, None]
        error_B1V = key_BK1.mT @ weight_BKV - values_BTV[:, t, None]
        errors.append(error_B1V)
        step_BKV = -2 * theta_BT[:, t, None, None] * (key_BK1 * error_B1V)
        if momentum_BKV is not None:
            step_BKV = eta_BT[:, t, None, None] * momentum_BKV + step_BKV
        moved_BKV = (1 - alpha_BT[:, t, None, None]) * weight_BKV + step_BKV
        if active_BT is None:
            weight_BKV, momentum_BKV = moved_BKV, None if momentum_BKV is None else step_BKV
            continue
        on_B11 = active_BT[:, t, None, None]
        weight_BKV = torch.where(on_B11, moved_BKV, weight_BKV)
        momentum_BKV = None if momentum_BKV is None else torch.where(on_B11, step_BKV, momentum_BKV)
    return weight_BKV, momentum_BKV, torch.cat(errors, 1) if errors else values_BTV
