"""Triton kernels of the search: score all rows roughly, collect what can be among the best, rank that exactly."""

# kernels are Triton's language, not Python's: their parameters have no Python types
# ruff: noqa: ANN001, ANN201, D103
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymem.kernels.topk_cosine import rounding

# rows whose best score stands for all of them when the threshold is sought
_GROUP = 16
_LEAST_FOUND = 512
_SCORES_AT_ONCE = 2**26
_REGISTER_FLOATS = 4096
# groups that are told apart when the threshold is sought; further ones are folded onto them
_PEAKS = 2048
_BLOCK_PEAKS = 128
# programs that a kernel of small pieces of work is cut into
_PROGRAMS = 512
# rows in a block, step along their width, warps, stages: of those tried on an H100, good for one query and for 64
_BLOCKS = {torch.float32: (128, 32, 8, 3), torch.bfloat16: (256, 64, 8, 3), torch.int8: (128, 64, 8, 4)}


@triton.jit
def topk_cosine_fwd_kernel_coarse(
    q, rows, scale, mask, out, count, Q, N, M, mask_stride, K: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, G: tl.constexpr, USE_MASK: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BQ)
    # queries vary fastest: programs that run together share rows in the cache
    i_q = tl.program_id(0) % blocks * BQ + tl.arange(0, BQ)
    i_n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    m_nq = (i_n[:, None] < N) & (i_q[None, :] < Q)
    b_acc = tl.zeros((BN, BQ), dtype=tl.float32)
    for i in range(0, K, BK):
        i_k = i + tl.arange(0, BK)
        m_r = (i_n[:, None] < N) & (i_k[None, :] < K)
        m_q = (i_k[:, None] < K) & (i_q[None, :] < Q)
        b_r = tl.load(rows + i_n[:, None].to(tl.int64) * K + i_k[None, :], mask=m_r, other=0)
        b_q = tl.load(q + i_q[None, :] * K + i_k[:, None], mask=m_q, other=0.0)
        if DIGIT is None:
            b_acc = tl.dot(b_r, b_q, b_acc, input_precision="tf32x3")
        else:
            b_high = b_q.to(tl.bfloat16)
            b_low = (b_q - b_high.to(tl.float32)).to(tl.bfloat16)
            b_r = b_r.to(DIGIT)
            b_acc = tl.dot(b_r, b_high.to(DIGIT), b_acc)
            b_acc = tl.dot(b_r, b_low.to(DIGIT), b_acc)
    b_acc *= tl.load(scale + i_n, mask=i_n < N, other=0.0)[:, None]
    m_seen = m_nq
    # a query's scores, then its peaks, each from a place that wide writes can start at
    begin = tl.cdiv(N, 32) * 32
    p_q = out + i_q[None, :].to(tl.int64) * (begin + tl.cdiv(M, 32) * 32)
    if USE_MASK:
        p_mask = mask + i_q[None, :].to(tl.int64) * mask_stride + i_n[:, None]
        m_seen = m_seen & (tl.load(p_mask, mask=m_nq, other=0) != 0)
    b_acc = tl.where(m_seen, b_acc, float("-inf"))
    tl.store(p_q + i_n[:, None], b_acc, mask=m_nq)
    b_peak = tl.max(tl.reshape(b_acc, (BN // G, G, BQ)), 1)
    i_m = tl.program_id(0) // blocks * (BN // G) + tl.arange(0, BN // G)
    tl.store(p_q + begin + i_m[:, None], b_peak, mask=(i_m[:, None] < M) & (i_q[None, :] < Q))
    if tl.program_id(0) < blocks:
        tl.store(count + i_q, tl.zeros((BQ,), dtype=tl.int32), mask=i_q < Q)
        tl.store(count + Q + i_q, tl.zeros((BQ,), dtype=tl.int32), mask=i_q < Q)


@triton.jit
def topk_cosine_fwd_kernel_collect(
    scores, count, found, slack, k, N, M, C, G: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    HALVINGS: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(0).to(tl.int64)
    i_p = tl.arange(0, BP)
    begin = tl.cdiv(N, 32) * 32
    scores += i_q * (begin + tl.cdiv(M, 32) * 32)
    peaks = scores + begin
    b_top = tl.full((BP,), float("-inf"), dtype=tl.float32)
    for first in range(0, M, BP):
        b_top = tl.maximum(b_top, tl.load(peaks + first + i_p, mask=first + i_p < M, other=float("-inf")))
    # as many groups of rows as are wanted reach `low`, so as many rows do
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        reached = tl.sum((b_top >= middle).to(tl.int32)) >= k
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    floor = tl.where(tl.sum((b_top >= low).to(tl.int32)) >= k, low - slack, float("-inf"))
    for first in range(tl.program_id(1) * BM, M, tl.num_programs(1) * BM):
        i_m = first + tl.arange(0, BM)
        b_peak = tl.load(peaks + i_m, mask=i_m < M, other=float("-inf"))
        i_n = i_m[:, None] * G + tl.arange(0, G)[None, :]
        m_n = ((b_peak >= floor) & (b_peak > float("-inf")))[:, None] & (i_n < N)
        b_score = tl.load(scores + i_n, mask=m_n, other=float("-inf"))
        m_n = m_n & (b_score >= floor) & (b_score > float("-inf"))
        # in any order: they are ranked by score and order later
        b_place = tl.atomic_add(count + i_q + tl.zeros_like(i_n), 1, mask=m_n)
        tl.store(found + i_q * C + b_place, i_n, mask=m_n & (b_place < C))


@triton.jit
def topk_cosine_fwd_kernel_rank(
    q, rows, scale, order, count, found, out_score, out_index, k, C, K: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(0).to(tl.int64)
    n_all = tl.load(count + i_q)
    n = tl.minimum(n_all, C)
    # bits of float32, behind the indices
    exact = found + tl.num_programs(0).to(tl.int64) * C
    i_k = tl.arange(0, BK)
    b_q = tl.load(q + i_q * K + i_k, mask=i_k < K, other=0.0)
    for first in range(tl.program_id(1) * BC, n, tl.num_programs(1) * BC):
        i_c = first + tl.arange(0, BC)
        i_n = tl.load(found + i_q * C + i_c, mask=i_c < n, other=0).to(tl.int64)
        m_r = (i_c[:, None] < n) & (i_k[None, :] < K)
        b_r = tl.load(rows + i_n[:, None] * K + i_k[None, :], mask=m_r, other=0).to(tl.float32)
        b_term = b_r * tl.load(scale + i_n)[:, None] * b_q[None, :]
        # the reference's order of addition, and a sum of two has but one
        for i in tl.static_range(HALVINGS):
            b_term = tl.sum(tl.reshape(b_term, (BC, 2, BK >> (i + 1))), 1)
        tl.store(exact + i_q * C + i_c, tl.reshape(b_term, (BC,)).to(tl.int32, bitcast=True), mask=i_c < n)
    # the program that is through last ranks what all have scored
    tl.debug_barrier()
    if tl.atomic_add(count + tl.num_programs(0) + i_q, 1) == tl.num_programs(1) - 1:
        for first in range(0, n, BA):
            i_a = first + tl.arange(0, BA)
            a_n = tl.load(found + i_q * C + i_a, mask=i_a < n, other=0)
            a_s = tl.load(exact + i_q * C + i_a, mask=i_a < n, other=0).to(tl.float32, bitcast=True)
            a_o = tl.load(order + a_n)
            place = tl.zeros((BA,), dtype=tl.int32)
            for other in range(0, n, BA):
                i_b = other + tl.arange(0, BA)
                b_n = tl.load(found + i_q * C + i_b, mask=i_b < n, other=0)
                b_s = tl.load(exact + i_q * C + i_b, mask=i_b < n, other=0).to(tl.float32, bitcast=True)
                b_o = tl.load(order + b_n)
                same = b_o[None, :] == a_o[:, None]
                earlier = (b_o[None, :] < a_o[:, None]) | (same & (b_n[None, :] < a_n[:, None]))
                before = (b_s[None, :] > a_s[:, None]) | ((b_s[None, :] == a_s[:, None]) & earlier)
                place += tl.sum((before & (i_b < n)[None, :]).to(tl.int32), 1)
            tl.store(out_score + i_q * k + place, a_s, mask=(i_a < n) & (place < k))
            tl.store(out_index + i_q * k + place, a_n.to(tl.int64), mask=(i_a < n) & (place < k))
        i_o = tl.arange(0, BO)
        tl.store(out_score + i_q * k + i_o, float("-inf"), mask=(i_o >= n) & (i_o < k))
        tl.store(out_index + i_q * k + i_o, -1, mask=(i_o >= n) & (i_o < k))
        tl.store(count + i_q, tl.maximum(n_all - C, 0))


def bound(width: int, dtype: torch.dtype) -> float:
    """How far a coarse score can lie from the exact one; the proof is in README.md."""
    lost = 3 * 2.0**-20 if dtype == torch.float32 else 2.0**-18
    return lost + 4 * rounding(width)


def topk_cosine_fwd(
    queries_QK: Tensor, rows_NK: Tensor, scale_N: Tensor, order_N: Tensor, k: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[Q, k]`, indices `[Q, k]`, and `[Q]` how many candidates there was no room for: with any, all is void."""
    held = rows_NK.contiguous(), scale_N.contiguous(), order_N.contiguous()
    queries_QK, step = queries_QK.float().contiguous(), max(1, _SCORES_AT_ONCE // rows_NK.shape[0])
    if queries_QK.shape[0] <= step:
        return _search(queries_QK, held, k, mask)
    parts = [
        _search(queries_QK[i : i + step], held, k, mask if mask is None or mask.dim() == 1 else mask[i : i + step])
        for i in range(0, queries_QK.shape[0], step)
    ]
    scores, index, over = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(index), torch.cat(over)


def _search(
    queries_QK: Tensor, held: tuple[Tensor, Tensor, Tensor], k: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows_NK, scale_N, order_N = held
    (Q, K), N, device = queries_QK.shape, rows_NK.shape[0], rows_NK.device
    scores_QL, count_2Q = coarse_pass(queries_QK, rows_NK, scale_N, mask)
    M, C = _cdiv(N, _GROUP), min(max(_LEAST_FOUND, 2 * k * _GROUP), N)
    found_2QC = torch.empty(2, Q, C, dtype=torch.int32, device=device)
    topk_cosine_fwd_kernel_collect[(Q, max(1, min(_cdiv(M, _BLOCK_PEAKS), _PROGRAMS // Q)))](
        scores_QL, count_2Q, found_2QC, 2 * bound(K, rows_NK.dtype), k, N, M, C,
        G=_GROUP, BM=_BLOCK_PEAKS, BP=min(_PEAKS, _power_of_2(M)), HALVINGS=14,
    )  # fmt: skip
    score_Qk = torch.empty(Q, k, dtype=torch.float32, device=device)
    index_Qk = torch.empty(Q, k, dtype=torch.int64, device=device)
    BK = _power_of_2(K)
    BC = max(1, min(4, _REGISTER_FLOATS // BK))
    # no fused multiply and add: the same bits as the reference
    topk_cosine_fwd_kernel_rank[(Q, min(32, _cdiv(C, BC)))](
        queries_QK, rows_NK, scale_N, order_N, count_2Q, found_2QC, score_Qk, index_Qk, k, C,
        K=K, BC=BC, BK=BK, BA=32, BO=_power_of_2(k), HALVINGS=BK.bit_length() - 1, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return score_Qk, index_Qk, count_2Q.cpu()[0]


def coarse_pass(
    queries_QK: Tensor, rows_NK: Tensor, scale_N: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rough cosines float32, -inf where hidden, and zeros `[2, Q]`.

    A query's N scores are followed, from the next multiple of 32 on, by the largest of each group of them.
    """
    (Q, K), N, device = queries_QK.shape, rows_NK.shape[0], rows_NK.device
    M = _cdiv(N, _GROUP)
    out = torch.empty(Q, 32 * (_cdiv(N, 32) + _cdiv(M, 32)), dtype=torch.float32, device=device)
    count = torch.empty(2, Q, dtype=torch.int32, device=device)
    BN, BK, warps, stages = _BLOCKS[rows_NK.dtype]
    BQ = min(64, max(16, _power_of_2(Q)))
    # the interpreter would multiply bfloat16 numbers as if their bits were integers
    digit = None if rows_NK.dtype == torch.float32 else tl.bfloat16 if rows_NK.is_cuda else tl.float32
    seen = rows_NK if mask is None else mask.contiguous().view(torch.uint8)
    topk_cosine_fwd_kernel_coarse[(_cdiv(N, BN) * _cdiv(Q, BQ),)](
        queries_QK, rows_NK, scale_N, seen, out, count, Q, N, M, 0 if mask is None or mask.dim() == 1 else N,
        K=K, BQ=BQ, BN=BN, BK=BK, G=_GROUP, USE_MASK=mask is not None, DIGIT=digit, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, count


# triton's own, made for kernels too, take microseconds
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()
