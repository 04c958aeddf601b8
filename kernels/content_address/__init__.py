"""Weightings over memory slots by content, for several heads and banks. The maths is in README.md."""

from __future__ import annotations

from torch import Tensor

from raymem.kernels.content_address.reference import EPSILON, content_address_reference, cosines

__all__ = ["EPSILON", "content_address", "content_address_reference", "cosines"]


def content_address(
    memory_BNW: Tensor,
    keys_BHW: Tensor,
    strength_BH: Tensor,
    mask_BHW: Tensor | None = None,
    held_BN: Tensor | None = None,
) -> Tensor:
    """Weighting `[B, H, N]` of each head, non-negative and summing to 1 over the slots held.

    Args:
        memory_BNW: `[B, N, W]` slots.
        keys_BHW: `[B, H, W]`, one key a head; neither needs unit length.
        strength_BH: `[B, H]`, 0 looks at all slots alike.
        mask_BHW: `[B, H, W]` in [0, 1], the dimensions that count. Default: all do.
        held_BN: bool `[B, N]`, False hides a slot. Default: all are held.

    Reference:
        NTM (1410.5401) equations 5 and 6; the mask is 1904.10278's.
    """
    return content_address_reference(memory_BNW, keys_BHW, strength_BH, mask_BHW, held_BN)
