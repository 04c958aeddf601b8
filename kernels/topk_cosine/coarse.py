"""Fast approximate scores of many rows, each with a bound on its own error."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_FLOAT32_ULP = 2.0**-23
# a matrix product in bfloat16 rounds its result to 8 bits: half a unit in the last place of values up to 1
_BF16_ROUNDING = 2.0**-9
# what torch may round the operands of a float32 product to: TF32 keeps 10 bits after the point, bfloat16 7
_LOST = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}


def rounding(width: int) -> float:
    """How far two float32 sums of `width` products of unit vectors, scaled and added in any order, can lie apart."""
    return (width + 16) * _FLOAT32_ULP


@cache
def int8_product_is_exact() -> bool:
    """Whether this machine's int8 matrix product keeps all bits: old vector units saturate 16-bit partial sums."""
    high = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(high, high.T.contiguous()) == 64 * 127 * 127).all())


def coarse_scores(queries_QK: Tensor, rows_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate cosines [Q, N] float32 and the largest error a query's scores can have [Q]."""
    # a GPU's bfloat16 product may add up parts that are rounded to bfloat16, in number unknown
    # torch 2.13's int8 product returns garbage for an inner width of 1
    wide = rows_NK.shape[1] > 1 and not rows_NK.is_cuda
    if rows_NK.dtype == torch.int8 and wide and int8_product_is_exact():
        scores_QN, error_Q = _int8(queries_QK, rows_NK)
    elif rows_NK.dtype == torch.bfloat16 and not rows_NK.is_cuda:
        short_QK = queries_QK.bfloat16()
        scores_QN = (short_QK @ rows_NK.T).float()
        error_Q = (queries_QK - short_QK.float()).norm(dim=1) + _BF16_ROUNDING
    else:
        scores_QN = queries_QK @ rows_NK.float().T
        error_Q = torch.full_like(queries_QK[:, 0], _LOST[torch.get_float32_matmul_precision()])
    return scores_QN * scale_N, error_Q + rounding(queries_QK.shape[1])


def _int8(queries_QK: Tensor, rows_NK: Tensor) -> tuple[Tensor, Tensor]:
    # the query as two int8 digits: the second one holds what rounding to the first lost
    high_QK, step_Q = _digit(queries_QK)
    rest_QK = queries_QK - high_QK * step_Q
    low_QK, low_step_Q = _digit(rest_QK)
    digits = torch.cat([high_QK, low_QK]).to(torch.int8)
    products_NQ = torch._int_mm(rows_NK, digits.T.contiguous())
    high_NQ, low_NQ = products_NQ.float().chunk(2, dim=1)
    scores_QN = (high_NQ * step_Q.T + low_NQ * low_step_Q.T).T
    return scores_QN, (rest_QK - low_QK * low_step_Q).norm(dim=1)


def _digit(values_QK: Tensor) -> tuple[Tensor, Tensor]:
    step_Q1 = values_QK.abs().amax(1, keepdim=True).clamp_min(torch.finfo(values_QK.dtype).tiny) / 127
    return (values_QK / step_Q1).round(), step_Q1
