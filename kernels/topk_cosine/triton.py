"""Triton kernel of the scoring pass: packed rows are widened in registers, products are summed in float32."""

# kernels are Triton's language, not Python's: their parameters have no Python types
# ruff: noqa: ANN001, ANN201, D103
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymem.kernels.topk_cosine.coarse import rounding


@triton.jit
def topk_cosine_fwd_kernel_scores(
    q, rows, scale, out, Q, N, K: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    i_q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    b_acc = tl.zeros((BQ, BN), dtype=tl.float32)
    for i in range(0, K, BK):
        i_k = i + tl.arange(0, BK)
        m_q = (i_q[:, None] < Q) & (i_k[None, :] < K)
        m_r = (i_n[:, None] < N) & (i_k[None, :] < K)
        b_q = tl.load(q + i_q[:, None] * K + i_k[None, :], mask=m_q, other=0.0)
        b_r = tl.load(rows + i_n[:, None].to(tl.int64) * K + i_k[None, :], mask=m_r, other=0).to(tl.float32)
        b_acc += tl.dot(b_q, tl.trans(b_r), input_precision="ieee")
    b_scale = tl.load(scale + i_n, mask=i_n < N, other=0.0)
    p_out = out + i_q[:, None].to(tl.int64) * N + i_n[None, :]
    tl.store(p_out, b_acc * b_scale[None, :], mask=(i_q[:, None] < Q) & (i_n[None, :] < N))


def topk_cosine_scores(queries_QK: Tensor, rows_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines float32 `[Q, N]` and the largest error a query's scores can have `[Q]`."""
    (Q, K), N = queries_QK.shape, len(rows_NK)
    out = torch.empty(Q, N, dtype=torch.float32, device=rows_NK.device)
    BQ, BN, BK = 16, 64, 64
    grid = (triton.cdiv(N, BN), triton.cdiv(Q, BQ))
    operands = (queries_QK.float().contiguous(), rows_NK.contiguous(), scale_N.contiguous())
    topk_cosine_fwd_kernel_scores[grid](*operands, out, Q, N, K, BQ=BQ, BN=BN, BK=BK)
    return out, out.new_full((Q,), rounding(K))
