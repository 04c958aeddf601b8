"""Triton kernel: a program sums weights of equal tokens of one query and stores each sum once, without atomics."""

# kernels are Triton's language, not Python's: their parameters have no Python types
# ruff: noqa: ANN001, ANN201, D103
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64


@triton.jit
def vocab_scatter_fwd_kernel(tokens, weights, out, k, V, BK: tl.constexpr):
    i_q = tl.program_id(0).to(tl.int64)
    i_k = tl.program_id(1) * BK + tl.arange(0, BK)
    b_token = tl.load(tokens + i_q * k + i_k, mask=i_k < k, other=-1)
    b_sum = tl.zeros((BK,), dtype=tl.float32)
    for first in range(0, k, BK):
        i_j = first + tl.arange(0, BK)
        b_other = tl.load(tokens + i_q * k + i_j, mask=i_j < k, other=-1)
        b_weight = tl.load(weights + i_q * k + i_j, mask=i_j < k, other=0.0)
        b_sum += tl.sum(tl.where(b_token[:, None] == b_other[None, :], b_weight[None, :], 0.0), 1)
    # every lane of one token holds the same sum, so it does not matter which lane's store comes last
    tl.store(out + i_q * V + b_token, b_sum, mask=b_token >= 0)


def vocab_scatter_fwd(tokens_Qk: Tensor, weights_Qk: Tensor, vocabulary: int) -> Tensor:
    """Launch the kernel; shapes as in `vocab_scatter`."""
    count, k = tokens_Qk.shape
    out = torch.zeros(count, vocabulary, dtype=torch.float32, device=weights_Qk.device)
    operands = (tokens_Qk.contiguous(), weights_Qk.float().contiguous(), out)
    BK = min(_BLOCK, triton.next_power_of_2(k))
    vocab_scatter_fwd_kernel[(count, triton.cdiv(k, BK))](*operands, k, vocabulary, BK=BK)
    return out
