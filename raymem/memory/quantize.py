"""Keys as they are kept: rounded to few bytes, with the scale that makes them unit length again."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KeyDtype = Literal["float32", "bfloat16", "int8"]
STORED: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def pack(keys_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round keys [..., K] to `dtype`; the scale [...] makes a rounded key unit length again (0 for zeros)."""
    if dtype == torch.int8:
        peak = keys_NK.abs().amax(-1, keepdim=True)
        rounded = (keys_NK * (127 / peak.clamp_min(torch.finfo(peak.dtype).tiny))).round().to(dtype)
    else:
        rounded = keys_NK.to(dtype)
    length = rounded.float().norm(dim=-1)
    return rounded, torch.where(length > 0, 1 / length.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def unpack(rounded_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Unit keys [..., K] float32."""
    return rounded_NK.float() * scale_N[..., None]
