"""Least squares of values on address weights, kept as exact sums over banks. The maths is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from raymem.kernels.rls_update.reference import (
    GRID_BITS,
    information_update_reference,
    leverage,
    ridge_factor,
    to_grid,
)

__all__ = ["GRID_BITS", "information_update", "information_update_reference", "leverage", "ridge_factor", "to_grid"]


def information_update(
    gram_BSS: Tensor, cross_BSV: Tensor, weights_BTS: Tensor, values_BTV: Tensor, sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`C + sign W^T W` and `B + sign W^T Z`; without gradients, in the storage given.

    Args:
        gram_BSS: float64 `[B, S, S]`.
        cross_BSV: float64 `[B, S, V]`; float32 where sums stay exact in it, as those of one-hot values do.
        weights_BTS: float64 `[B, T, S]` on the grid of `to_grid`; a row of zeros changes nothing.
        values_BTV: float64 `[B, T, V]`.
        sign: 1 writes, -1 forgets.

    Reference:
        Larimar (2403.11901) equations 3 and 4, in information form.
    """
    if torch.is_grad_enabled():
        return information_update_reference(gram_BSS, cross_BSV, weights_BTS, values_BTV, sign)
    gram = gram_BSS.baddbmm_(weights_BTS.mT, weights_BTS, alpha=sign)
    return gram, cross_BSV.add_((weights_BTS.mT @ values_BTV).to(cross_BSV.dtype), alpha=sign)
