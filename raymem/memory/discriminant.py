"""Which class a point belongs to, told by sums over the points of each: Gaussians that share one covariance.

Shape legend: `B` banks, `Q` queries, `S` dimensions, `U` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# how many rows the prior, a mean of zero, is worth
_PRIOR_ROWS = 0.3
# how much of a sphere, of the rows' own size, is in their covariance
_ROUND = 0.3


def log_posterior(gram_BSS: Tensor, cross_BSU: Tensor, rows_BU: Tensor, points_BQS: Tensor) -> Tensor:
    """Logarithms `[B, Q, U]` of each class's probability at the points, up to a constant a query.

    A class of n rows that sum to b has the mean b / (n + kappa), known as well as n + kappa rows allow; the covariance
    is that of rows about their own class's mean, and part of a sphere that makes it positive definite. So
    `log n - |q - m|^2 / 2v - S/2 log v`, the distance in that covariance and `v = 1 + 1 / (n + kappa)`. A class without
    rows has a finite logarithm that means nothing.

    Args:
        gram_BSS: float64, the sum of `w^T w` over all rows, those of no class among them.
        cross_BSU: the sum of each class's rows.
        rows_BU: how many rows each class has.
        points_BQS: float64.

    Reference:
        Fisher 1936, linear discriminants; Ledoit and Wolf 2004 for the sphere; the predictive distribution of a
        Gaussian of known covariance whose mean has a conjugate prior.
    """
    cross, rows = cross_BSU.double(), rows_BU.double().clamp_min(1)
    # rows are unit, so that the trace of their sum of squares counts them
    total_B11 = gram_BSS.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    within_BSS = gram_BSS - (cross / rows[:, None]) @ cross.mT
    unit_SS = torch.eye(gram_BSS.shape[-1], dtype=gram_BSS.dtype, device=gram_BSS.device)
    # a bank that has seen nothing has no scatter either
    sphere_B11 = (_ROUND / len(unit_SS) * total_B11).clamp_min(torch.finfo(total_B11.dtype).eps)
    factor_BSS = torch.linalg.cholesky(within_BSS + sphere_B11 * unit_SS)
    known_BU = rows + _PRIOR_ROWS
    means_BSU = _whitened(factor_BSS, cross / known_BU[:, None])
    asked_BSQ = _whitened(factor_BSS, points_BQS.mT)
    square_BQU = asked_BSQ.square().sum(1)[..., None] + means_BSU.square().sum(1)[:, None]
    distance_BQU = (square_BQU - 2 * asked_BSQ.mT @ means_BSU).clamp_min(0) * total_B11
    spread_B1U = (1 + 1 / known_BU)[:, None]
    volume_B1U = gram_BSS.shape[-1] * spread_B1U.log()
    log_posterior_BQU: Tensor = rows.log()[:, None] - (distance_BQU / spread_B1U + volume_B1U) / 2
    return log_posterior_BQU


def _whitened(factor_BSS: Tensor, columns_BSN: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(factor_BSS, columns_BSN, upper=False)
    return solved
