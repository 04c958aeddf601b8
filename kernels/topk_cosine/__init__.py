"""Exact top-k by cosine over packed rows: a fast pass picks candidates, float32 ranks them. See README.md."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from raymem.errors import InvalidInput
from raymem.kernels.dispatch import undispatched, use_triton
from raymem.kernels.topk_cosine.reference import exact_scores, sort_found, topk_cosine_reference

__all__ = ["topk_cosine", "topk_cosine_reference"]

_BLOCK_ROWS = 65_536
# a block's gathered rows have to fit a processor's cache: with 64 queries each takes ten times as long
_BLOCK_QUERIES, _BLOCK_QUERIES_CUDA = 8, 64
_SPARE_CANDIDATES = 32
# the kernel that ranks compares all pairs of up to 32 k candidates
_TRITON_K = 256
_FLOAT32_ULP = 2.0**-23
# a matrix product in bfloat16 rounds its result to 8 bits: half a unit in the last place of values up to 1
_BF16_ROUNDING = 2.0**-9
# what torch may round the operands of a float32 product to: TF32 keeps 10 bits after the point, bfloat16 7
_LOST = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}


def topk_cosine(
    queries_QK: Tensor,
    rows_NK: Tensor,
    scale_N: Tensor,
    order_N: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of highest cosine for each query, best first, ties to the smaller order; the result is exact.

    Args:
        queries_QK: float32 `[Q, K]`, unit length.
        rows_NK: float32, bfloat16 or int8 `[N, K]`.
        scale_N: float32 `[N]`: a row times its scale has length 1 (0 for a row of zeros).
        order_N: int64 `[N]`, breaks ties.
        k: how many rows a query gets.
        mask: bool `[N]` or `[Q, N]`, False hides a row inside the search. Default: all are seen.
        backend: "torch", "triton" or "auto". Default: by device.

    Returns:
        scores float32 `[Q, k]` (-inf where absent) and row indices int64 `[Q, k]` (-1 where absent).

    Raises:
        InvalidInput: shapes that don't fit, naming them.
    """
    with undispatched(rows_NK):
        if queries_QK.dim() != 2 or rows_NK.dim() != 2 or queries_QK.shape[1] != rows_NK.shape[1] or k < 0:
            raise InvalidInput(
                f"queries {list(queries_QK.shape)} and rows {list(rows_NK.shape)} need one width, and k={k} at least 0"
            )
        expected = ([len(rows_NK)], [len(queries_QK), len(rows_NK)])
        if mask is not None and list(mask.shape) not in expected:
            raise InvalidInput(f"mask is {list(mask.shape)}; expected {expected[0]} or {expected[1]}")
        if len(rows_NK) == 0 or len(queries_QK) == 0 or k == 0:
            return topk_cosine_reference(queries_QK, rows_NK, scale_N, order_N, k, mask)
        if use_triton(rows_NK, backend) and k <= _TRITON_K:
            from raymem.kernels.topk_cosine.triton import topk_cosine_fwd as search
        else:
            search = _search
        scores_Qk, index_Qk, unsure_Q = search(queries_QK, rows_NK, scale_N, order_N, k, mask)
        unsure = torch.nonzero(unsure_Q)[:, 0]
        if len(unsure):
            unsure = unsure.to(rows_NK.device)
            seen = mask if mask is None or mask.dim() == 1 else mask[unsure]
            exact = topk_cosine_reference(queries_QK[unsure], rows_NK, scale_N, order_N, k, seen)
            scores_Qk[unsure], index_Qk[unsure] = exact
    return scores_Qk, index_Qk


def _search(
    queries_QK: Tensor, rows_NK: Tensor, scale_N: Tensor, order_N: Tensor, k: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [Q, k], indices [Q, k], and which queries [Q] may have better rows than those found."""
    width = min(len(rows_NK), 2 * k + _SPARE_CANDIDATES)
    coarse_Qc, index_Qc, error_Q = _candidates(queries_QK, rows_NK, scale_N, width, mask)
    parts = []
    size = _BLOCK_QUERIES_CUDA if rows_NK.is_cuda else _BLOCK_QUERIES
    # one that lies two errors under the k-th is none of the k best, whatever both score exactly
    far_Qc = coarse_Qc < (coarse_Qc[:, min(k, width) - 1] - 2 * error_Q)[:, None]
    for start in range(0, len(queries_QK), size):
        block = slice(start, start + size)
        near = width - int(far_Qc[block].all(0).sum())
        index, hidden = index_Qc[block, :near], coarse_Qc[block, :near] == float("-inf")
        exact = exact_scores(queries_QK[block], rows_NK[index], scale_N[index]).masked_fill(hidden, float("-inf"))
        parts.append(sort_found(exact, order_N[index], index, k))
    scores_Qk, index_Qk = (torch.cat(part) for part in zip(*parts, strict=True))
    # a row left out scores at most the worst candidate plus the error; when that reaches the k-th, look at all rows
    worst_Q = coarse_Qc.amin(1)
    unsure_Q = (worst_Q + error_Q >= scores_Qk[:, -1]) & torch.isfinite(worst_Q)
    return scores_Qk, index_Qk, unsure_Q.cpu() & (width < len(rows_NK))


def _candidates(
    queries_QK: Tensor, rows_NK: Tensor, scale_N: Tensor, width: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(rows_NK), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        scores_QN, error_Q = coarse_scores(queries_QK, rows_NK[block], scale_N[block])
        if mask is not None:
            scores_QN = scores_QN.masked_fill(~mask[..., block], float("-inf"))
        best, index = scores_QN.topk(min(width, scores_QN.shape[1]), dim=1)
        if found is None:
            found = best, index
            continue
        merged = torch.cat([found[0], best], 1)
        kept, place = merged.topk(min(width, merged.shape[1]), dim=1)
        found = kept, torch.cat([found[1], index + start], 1).gather(1, place)
    assert found is not None
    return *found, error_Q


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
