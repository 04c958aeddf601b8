"""Triton kernel of the recurrence: a program keeps its columns of the memory in registers for the whole sequence."""

# kernels are Triton's language, not Python's: their parameters have no Python types
# ruff: noqa: ANN001, ANN201, D103
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def delta_update_fwd_kernel_recurrent(
    w, s, k, v, theta, eta, alpha, active, w_out, s_out, e_out, T, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, USE_MOMENTUM: tl.constexpr, USE_ACTIVE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_k = tl.arange(0, BK)
    i_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k, m_v = i_k < K, i_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    i_kv = i_b * K * V + i_k[:, None] * V + i_v[None, :]
    b_w = tl.load(w + i_kv, mask=m_kv, other=0.0)
    b_s = tl.zeros((BK, BV), dtype=tl.float32)
    if USE_MOMENTUM:
        b_s = tl.load(s + i_kv, mask=m_kv, other=0.0)
    i_t = i_b * T
    n_k = tl.load(k + i_t * K + i_k, mask=m_k, other=0.0)
    n_v = tl.load(v + i_t * V + i_v, mask=m_v, other=0.0)
    n_theta, n_eta, n_alpha = tl.load(theta + i_t), tl.load(eta + i_t), tl.load(alpha + i_t)
    for t in range(T):
        i_t = i_b * T + t
        b_k, b_v, b_theta, b_eta, b_alpha = n_k, n_v, n_theta, n_eta, n_alpha
        # a step is shorter than a read of memory: the next token's is under way meanwhile
        i_next = i_b * T + tl.minimum(t + 1, T - 1)
        n_k = tl.load(k + i_next * K + i_k, mask=m_k, other=0.0)
        n_v = tl.load(v + i_next * V + i_v, mask=m_v, other=0.0)
        n_theta, n_eta, n_alpha = tl.load(theta + i_next), tl.load(eta + i_next), tl.load(alpha + i_next)
        b_e = tl.sum(b_k[:, None] * b_w, 0) - b_v
        tl.store(e_out + i_t * V + i_v, b_e, mask=m_v)
        b_step = -2.0 * b_theta * b_k[:, None] * b_e[None, :]
        if USE_MOMENTUM:
            b_step = b_eta * b_s + b_step
        b_moved = (1.0 - b_alpha) * b_w + b_step
        if USE_ACTIVE:
            on = tl.load(active + i_t) != 0
            b_w = tl.where(on, b_moved, b_w)
            b_s = tl.where(on, b_step, b_s)
        else:
            b_w = b_moved
            b_s = b_step
    tl.store(w_out + i_kv, b_w, mask=m_kv)
    if USE_MOMENTUM:
        tl.store(s_out + i_kv, b_s, mask=m_kv)


def recurrent_delta_update_fwd(
    weight_BKV: Tensor,
    momentum_BKV: Tensor | None,
    keys_BTK: Tensor,
    values_BTV: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    active_BT: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the kernel on float32 tensors; shapes as in `recurrent_delta_update`."""
    (B, T, K), V = keys_BTK.shape, values_BTV.shape[2]
    BK = triton.next_power_of_2(K)
    # one warp a program: sums within it need no barrier. few columns make a step short, and a step is what takes time
    BV = min(triton.next_power_of_2(V), max(2, 1024 // BK))
    weight, keys, values = (x.contiguous() for x in (weight_BKV, keys_BTK, values_BTV))
    theta, eta, alpha = (gate.expand(B, T).contiguous() for gate in gates)
    momentum = weight if momentum_BKV is None else momentum_BKV.contiguous()
    active = theta if active_BT is None else active_BT.to(torch.int8).contiguous()
    weight_out, errors = torch.empty_like(weight), torch.empty_like(values)
    momentum_out = None if momentum_BKV is None else torch.empty_like(momentum)
    delta_update_fwd_kernel_recurrent[(B, triton.cdiv(V, BV))](
        weight, momentum, keys, values, theta, eta, alpha, active,
        weight_out, weight_out if momentum_out is None else momentum_out, errors,
        T, K=K, V=V, BK=BK, BV=BV, USE_MOMENTUM=momentum_BKV is not None, USE_ACTIVE=active_BT is not None,
        num_warps=triton.cdiv(BK, 1024),
    )  # fmt: skip
    return weight_out, momentum_out, errors
