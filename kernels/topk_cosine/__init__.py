"""Exact top-k by cosine over packed rows: a fast pass picks candidates, float32 ranks them. See README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from raymem.errors import InvalidInput
from raymem.kernels.dispatch import undispatched, use_triton
from raymem.kernels.topk_cosine.coarse import coarse_scores
from raymem.kernels.topk_cosine.reference import exact_scores, sort_found, topk_cosine_reference

__all__ = ["topk_cosine", "topk_cosine_reference"]

_BLOCK_ROWS = 65_536
# what a block gathers has to stay in a processor's cache: 64 queries take ten times as long each
_BLOCK_QUERIES, _BLOCK_QUERIES_CUDA = 8, 64
_SPARE_CANDIDATES = 32
# the kernels' ranking compares all pairs of up to 32 k candidates
_TRITON_K = 256


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
        _check(queries_QK, rows_NK, k, mask)
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
    width = min(len(rows_NK), 2 * k + _SPARE_CANDIDATES)
    coarse_Qc, index_Qc, error_Q = _candidates(queries_QK, rows_NK, scale_N, width, mask)
    scores_Qk, index_Qk = _rank(queries_QK, rows_NK, scale_N, order_N, k, coarse_Qc, index_Qc)
    # a row left out scores at most the worst candidate plus the error; when that reaches the k-th, look at all rows
    worst_Q = coarse_Qc.amin(1)
    unsure_Q = (worst_Q + error_Q >= scores_Qk[:, -1]) & torch.isfinite(worst_Q)
    return scores_Qk, index_Qk, unsure_Q.cpu() & (width < len(rows_NK))


def _check(queries_QK: Tensor, rows_NK: Tensor, k: int, mask: Tensor | None) -> None:
    if queries_QK.dim() != 2 or rows_NK.dim() != 2 or queries_QK.shape[1] != rows_NK.shape[1] or k < 0:
        raise InvalidInput(
            f"queries {list(queries_QK.shape)} and rows {list(rows_NK.shape)} need one width, and k={k} at least 0"
        )
    expected = ([len(rows_NK)], [len(queries_QK), len(rows_NK)])
    if mask is not None and list(mask.shape) not in expected:
        raise InvalidInput(f"mask is {list(mask.shape)}; expected {expected[0]} or {expected[1]}")


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


def _rank(
    queries_QK: Tensor,
    rows_NK: Tensor,
    scale_N: Tensor,
    order_N: Tensor,
    k: int,
    coarse_Qc: Tensor,
    index_Qc: Tensor,
) -> tuple[Tensor, Tensor]:
    parts = []
    size = _BLOCK_QUERIES_CUDA if rows_NK.is_cuda else _BLOCK_QUERIES
    for start in range(0, len(queries_QK), size):
        block = slice(start, start + size)
        index, hidden = index_Qc[block], coarse_Qc[block] == float("-inf")
        exact = exact_scores(queries_QK[block], rows_NK[index], scale_N[index]).masked_fill(hidden, float("-inf"))
        parts.append(sort_found(exact, order_N[index], index, k))
    return torch.cat([scores for scores, _ in parts]), torch.cat([index for _, index in parts])
