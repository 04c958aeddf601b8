"""Least squares as sums, in plain torch: the ground truth of this folder. The maths is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

GRID_BITS = 16


def to_grid(numbers: Tensor, bits: int = GRID_BITS) -> Tensor:
    """Numbers rounded to multiples of 2^-bits, whose products float64 sums up exactly; gradients pass through."""
    rounded = (numbers.detach() * 2.0**bits).round() / 2.0**bits
    return numbers + (rounded - numbers.detach()) if numbers.requires_grad else rounded


def information_update_reference(
    gram_BSS: Tensor, cross_BSV: Tensor, weights_BTS: Tensor, values_BTV: Tensor, sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `information_update` computes; differentiable in everything."""
    signed_BST = sign * weights_BTS.mT
    return gram_BSS + signed_BST @ weights_BTS, cross_BSV + (signed_BST @ values_BTV).to(cross_BSV.dtype)


def ridge_factor(gram_BSS: Tensor, ridge: float) -> Tensor:
    """Cholesky factor `[B, S, S]` of `C + ridge I`, which the ridge keeps positive definite."""
    factor: Tensor
    unit_SS = torch.eye(gram_BSS.shape[-1], dtype=gram_BSS.dtype, device=gram_BSS.device)
    factor, info = torch.linalg.cholesky_ex(gram_BSS + ridge * unit_SS)
    assert not bool(info.any()), "a sum of squares plus a ridge is positive definite"
    return factor


def leverage(
    factor_BSS: Tensor, cross_BSV: Tensor, weights_BTS: Tensor, values_BTV: Tensor, spread_B: Tensor
) -> Tensor:
    """`W G^-1 W^T + R R^T / t` `[B, T, T]` of rows, t being `spread_B`; over 1 where the rows were never written."""
    solved_BST = torch.cholesky_solve(weights_BTS.mT, factor_BSS)
    residual_BTV = values_BTV - solved_BST.mT @ cross_BSV
    return weights_BTS @ solved_BST + residual_BTV @ residual_BTV.mT / spread_B[:, None, None]
