"""Exact cosine search in plain torch: every row scored in float32, one fixed order of addition, ties by row order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK_ROWS = 4096


def exact_scores(queries_QK: Tensor, rows_QNK: Tensor, scale_QN: Tensor) -> Tensor:
    """Cosines float32 [Q, N] of each query with its own rows; a row's score does not depend on the rows beside it."""
    terms = rows_QNK.float() * scale_QN[..., None] * queries_QK[:, None]
    while (width := terms.shape[-1]) > 1:
        half = 1 << (width - 1).bit_length() - 1
        terms[..., : width - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms.sum(-1)


def sort_found(scores_QN: Tensor, order_QN: Tensor, index_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of scored rows, by score and then by the smaller order; absent ones are -inf and -1."""
    by_order = order_QN.argsort(dim=1, stable=True)
    by_score = scores_QN.gather(1, by_order).argsort(dim=1, descending=True, stable=True)[:, :k]
    best = by_order.gather(1, by_score)
    scores_Qk, index_Qk = scores_QN.gather(1, best), index_QN.gather(1, best)
    index_Qk = index_Qk.masked_fill(scores_Qk == float("-inf"), -1)
    missing = k - best.shape[1]
    return pad(scores_Qk, (0, missing), value=float("-inf")), pad(index_Qk, (0, missing), value=-1)


def topk_cosine_reference(
    queries_QK: Tensor, rows_NK: Tensor, scale_N: Tensor, order_N: Tensor, k: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `topk_cosine` computes, one query at a time over all rows."""
    found = [
        _search_one(query_K, rows_NK, scale_N, order_N, k, mask if mask is None or mask.dim() == 1 else mask[q])
        for q, query_K in enumerate(queries_QK)
    ]
    if not found:
        return queries_QK.new_empty(0, k), order_N.new_empty(0, k)
    return torch.cat([scores for scores, _ in found]), torch.cat([index for _, index in found])


def _search_one(
    query_K: Tensor, rows_NK: Tensor, scale_N: Tensor, order_N: Tensor, k: int, mask_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    blocks = [slice(i, i + _BLOCK_ROWS) for i in range(0, len(rows_NK), _BLOCK_ROWS)]
    parts = [exact_scores(query_K[None], rows_NK[block][None], scale_N[block][None]) for block in blocks]
    scores_1N = torch.cat([query_K.new_empty(1, 0), *parts], 1)
    if mask_N is not None:
        scores_1N = scores_1N.masked_fill(~mask_N, float("-inf"))
    return sort_found(scores_1N, order_N[None], torch.arange(len(rows_NK), device=rows_NK.device)[None], k)
