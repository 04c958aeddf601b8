"""Temporal links between memory slots, in plain torch: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def link_update_reference(link_BNN: Tensor, precedence_BN: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
    """What `link_update` computes; differentiable in everything."""
    kept_BNN = (1 - weights_BN[:, :, None] - weights_BN[:, None]) * link_BNN
    linked_BNN = kept_BNN + weights_BN[:, :, None] * precedence_BN[:, None]
    off_diagonal = 1 - torch.eye(link_BNN.shape[-1], dtype=link_BNN.dtype, device=link_BNN.device)
    return linked_BNN * off_diagonal, (1 - weights_BN.sum(-1, keepdim=True)) * precedence_BN + weights_BN
