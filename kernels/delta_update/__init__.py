"""Online regression of values on keys with momentum and decay, over banks. The maths is in README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymem.kernels.delta_update.chunk import Transition, chunk_delta_update, transition
from raymem.kernels.delta_update.reference import recurrent_delta_update_reference
from raymem.kernels.dispatch import undispatched, use_triton

__all__ = [
    "Transition",
    "chunk_delta_update",
    "prefers_tokens",
    "recurrent_delta_update",
    "recurrent_delta_update_reference",
    "transition",
]


def recurrent_delta_update(
    weight_BKV: Tensor,
    momentum_BKV: Tensor | None,
    keys_BTK: Tensor,
    values_BTV: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    active_BT: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One step of `S = eta S - theta grad |k M - v|^2`, `M = (1 - alpha) M + S` for each token in turn.

    Args:
        weight_BKV: `[B, K, V]` memory, float32 (float64 in torch only).
        momentum_BKV: `[B, K, V]`, or None where eta is 0.
        keys_BTK: `[B, T, K]`.
        values_BTV: `[B, T, V]`.
        gates: theta, eta and alpha, each `[B, T]`.
        active_BT: bool `[B, T]`; a row that is False changes nothing. Default: all are active.
        backend: "torch", "triton" or "auto". Default: by device.

    Returns:
        Weight and momentum after the last token, and each token's error before its own write `[B, T, V]`.

    Reference:
        Titans (2501.00663) equations 9, 10 and 13, loss summed over features.
    """
    if keys_BTK.shape[1] == 0 or weight_BKV.dtype != torch.float32 or not use_triton(weight_BKV, backend):
        return recurrent_delta_update_reference(weight_BKV, momentum_BKV, keys_BTK, values_BTV, gates, active_BT)
    inputs = (weight_BKV, momentum_BKV, keys_BTK, values_BTV, *gates, active_BT)
    with undispatched(weight_BKV):
        weight, momentum, errors = _Recurrent.apply(*inputs)  # type: ignore[no-untyped-call]
    return weight, momentum, errors


def prefers_tokens(weight_BKV: Tensor) -> bool:
    """Whether `recurrent_delta_update` is the faster way to advance this memory by a chunk of tokens.

    On a GPU it is one kernel where the chunk form is a dozen; but its backward pass goes token by token.
    """
    return weight_BKV.dtype == torch.float32 and not torch.is_grad_enabled() and use_triton(weight_BKV)


class _Recurrent(torch.autograd.Function):
    """Triton forward; the backward pass runs the reference again and differentiates that."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        from raymem.kernels.delta_update.triton import recurrent_delta_update_fwd

        weight, momentum, keys, values, theta, eta, alpha, active = inputs
        ctx.save_for_backward(*inputs)
        return recurrent_delta_update_fwd(weight, momentum, keys, values, (theta, eta, alpha), active)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needed = [need and x is not None for need, x in zip(ctx.needs_input_grad, ctx.saved_tensors, strict=True)]
        saved: list[Any] = [
            x if x is None else x.detach().requires_grad_(need)
            for need, x in zip(needed, ctx.saved_tensors, strict=True)
        ]
        weight, momentum, keys, values, theta, eta, alpha, active = saved
        with torch.enable_grad():
            outputs = recurrent_delta_update_reference(weight, momentum, keys, values, (theta, eta, alpha), active)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
        sources = [x for need, x in zip(needed, saved, strict=True) if need]
        found = iter(torch.autograd.grad([o for o, _ in pairs], sources, [g for _, g in pairs], allow_unused=True))
        return tuple(next(found) if need else None for need in needed)
