"""Which memory slot was written after which, over banks. The maths is in README.md."""

from __future__ import annotations

from torch import Tensor

from raymem.kernels.link_update.reference import link_update_reference

__all__ = ["link_update", "link_update_reference"]


def link_update(link_BNN: Tensor, precedence_BN: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Links `[B, N, N]` and precedence `[B, N]` after a write.

    Args:
        link_BNN: `[B, N, N]`; entry i, j says how much slot i was written right after slot j.
        precedence_BN: `[B, N]` how much each slot was the one written last.
        weights_BN: `[B, N]` write weighting, its sum at most 1.

    Reference:
        Graves et al. 2016, Nature 538:471, Methods, "Temporal memory linkage".
    """
    return link_update_reference(link_BNN, precedence_BN, weights_BN)
