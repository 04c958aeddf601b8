"""Triton kernel of the recurrence: a program keeps its columns of the memory in registers for the whole sequence."""

# kernels are Triton's language, not Python's: their parameters have no Python types
# ruff: noqa: ANN001, ANN201, D103
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_REGISTER_FLOATS = 4096


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
    for t in range(T):
        i_t = i_b * T + t
        b_k = tl.load(k + i_t * K + i_k, mask=m_k, other=0.0)
        b_v = tl.load(v + i_t * V + i_v, mask=m_v, other=0.0)
        b_e = tl.sum(b_k[:, None] * b_w, 0) - b_v
        tl.store(e_out + i_t * V + i_v, b_e, mask=m_v)
        b_step = -2.0 * tl.load(theta + i_t) * b_k[:, None] * b_e[None, :]
        if USE_MOMENTUM:
            b_step = tl.load(eta + i_t) * b_s + b_step
        b_moved = (1.0 - tl.load(alpha + i_t)) * b_w + b_step
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
    BV = max(1, min(triton.next_power_of_2(V), _REGISTER_FLOATS // BK))
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
    )  # fmt: skip
    return weight_out, momentum_out, errors
