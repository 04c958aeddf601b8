"""From retrieved tokens with weights to a distribution over the vocabulary. The maths is in README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymem.kernels.dispatch import undispatched, use_triton
from raymem.kernels.vocab_scatter.reference import vocab_scatter_reference

__all__ = ["vocab_scatter", "vocab_scatter_reference"]

# the kernel compares all pairs of a query's tokens: at 1024 it took five times as long as torch's atomics
_TRITON_K = 256


def vocab_scatter(tokens_Qk: Tensor, weights_Qk: Tensor, vocabulary: int, *, backend: str | None = None) -> Tensor:
    """Sum the weights of equal tokens into `[Q, vocabulary]` float32.

    Args:
        tokens_Qk: int64 `[Q, k]`, each below `vocabulary`; negative ones are absent.
        weights_Qk: float32 `[Q, k]`.
        vocabulary: width of the result.
        backend: "torch", "triton" or "auto". Default: by device.
    """
    if tokens_Qk.numel() == 0 or tokens_Qk.shape[1] > _TRITON_K or not use_triton(weights_Qk, backend):
        return vocab_scatter_reference(tokens_Qk, weights_Qk, vocabulary)
    with undispatched(weights_Qk):
        if weights_Qk.requires_grad:
            scattered: Tensor = _Scatter.apply(tokens_Qk, weights_Qk, vocabulary)  # type: ignore[no-untyped-call]
            return scattered
        return _scatter(tokens_Qk, weights_Qk, vocabulary)


def _scatter(tokens_Qk: Tensor, weights_Qk: Tensor, vocabulary: int) -> Tensor:
    from raymem.kernels.vocab_scatter.triton import vocab_scatter_fwd

    return vocab_scatter_fwd(tokens_Qk, weights_Qk, vocabulary)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        tokens_Qk, weights_Qk, vocabulary = inputs
        ctx.save_for_backward(tokens_Qk)
        return _scatter(tokens_Qk, weights_Qk, vocabulary)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (tokens_Qk,) = ctx.saved_tensors
        return None, grads[0].gather(1, tokens_Qk.clamp_min(0)) * (tokens_Qk >= 0), None
