"""Weights of retrieved tokens summed by token id, in plain torch."""

from __future__ import annotations

from torch import Tensor


def vocab_scatter_reference(tokens_Qk: Tensor, weights_Qk: Tensor, vocabulary: int) -> Tensor:
    """What `vocab_scatter` computes."""
    present_Qk = tokens_Qk >= 0
    out_QV = weights_Qk.new_zeros(len(tokens_Qk), vocabulary)
    return out_QV.scatter_add_(1, tokens_Qk.clamp_min(0), weights_Qk * present_Qk)
