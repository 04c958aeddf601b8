"""Softmax of scaled cosines over memory slots, in plain torch: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def cosines(memory_BNW: Tensor, keys_BHW: Tensor, mask_BHW: Tensor | None = None) -> Tensor:
    """Cosine `[B, H, N]` of keys with slots, both multiplied by the mask first; 0 where either is 0."""
    if mask_BHW is None:
        products_BHN = keys_BHW @ memory_BNW.mT
        lengths_BHN = keys_BHW.norm(dim=-1)[..., None] * memory_BNW.norm(dim=-1)[:, None]
        return _divided(products_BHN, lengths_BHN)
    masked_BHNW = memory_BNW[:, None] * mask_BHW[:, :, None]
    masked_BHW = keys_BHW * mask_BHW
    products_BHN = (masked_BHNW @ masked_BHW[..., None])[..., 0]
    lengths_BHN = masked_BHW.norm(dim=-1)[..., None] * masked_BHNW.norm(dim=-1)
    return _divided(products_BHN, lengths_BHN)


def _divided(products: Tensor, lengths: Tensor) -> Tensor:
    return products / (lengths + EPSILON)


def content_address_reference(
    memory_BNW: Tensor,
    keys_BHW: Tensor,
    strength_BH: Tensor,
    mask_BHW: Tensor | None = None,
    held_BN: Tensor | None = None,
) -> Tensor:
    """What `content_address` computes; differentiable in everything but `held_BN`."""
    scores_BHN = strength_BH[..., None] * cosines(memory_BNW, keys_BHW, mask_BHW)
    if held_BN is None:
        return torch.softmax(scores_BHN, -1)
    # finite where nothing is held, so that nothing turns into NaN
    hidden = ~held_BN[:, None]
    weights = torch.softmax(scores_BHN.masked_fill(hidden, torch.finfo(scores_BHN.dtype).min), -1)
    return weights.masked_fill(hidden, 0.0)
