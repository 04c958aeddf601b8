"""Triton kernel: one program sums one query's weights of equal tokens and stores each sum once, without atomics."""

# kernels are Triton's language, not Python's: their parameters have no Python types
# ruff: noqa: ANN001, ANN201, D103
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def vocab_scatter_fwd_kernel(tokens, weights, out, k, V: tl.constexpr, BK: tl.constexpr):
    i_q = tl.program_id(0).to(tl.int64)
    i_k = tl.arange(0, BK)
    b_token = tl.load(tokens + i_q * k + i_k, mask=i_k < k, other=-1)
    b_weight = tl.load(weights + i_q * k + i_k, mask=i_k < k, other=0.0)
    # every lane of one token holds the same sum, so it does not matter which lane's store comes last
    same = b_token[:, None] == b_token[None, :]
    b_sum = tl.sum(tl.where(same, b_weight[None, :], 0.0), 1)
    tl.store(out + i_q * V + b_token, b_sum, mask=b_token >= 0)


def vocab_scatter_fwd(tokens_Qk: Tensor, weights_Qk: Tensor, vocabulary: int) -> Tensor:
    """Launch the kernel; shapes as in `vocab_scatter`."""
    count, k = tokens_Qk.shape
    out = torch.zeros(count, vocabulary, dtype=torch.float32, device=weights_Qk.device)
    operands = (tokens_Qk.contiguous(), weights_Qk.float().contiguous(), out)
    vocab_scatter_fwd_kernel[(count,)](*operands, k, V=vocabulary, BK=triton.next_power_of_2(k))
    return out
