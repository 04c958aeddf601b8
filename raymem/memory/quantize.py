"""Keys as they are kept: in few dimensions and few bytes, with the scale that makes them unit length again."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from raymem.errors import InvalidSpec

KeyDtype = Literal["float32", "bfloat16", "int8"]
STORED: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_BLOCK_ROWS = 64
# of a projection: 0.5 GB while it is drawn
_MOST_NUMBERS = 2**26


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


class Projection(nn.Module):
    """Seeded orthonormal projection of unit keys to `dims` dimensions, unit length again; the identity without `dims`.

    The same seed gives every bank the same projection. A key's projection does not depend on the rows beside it.
    """

    matrix_KP: Tensor

    def __init__(self, width: int, dims: int | None, seed: int) -> None:
        super().__init__()
        self.dims = width if dims is None else dims
        self.identity = self.dims == width
        if self.dims > width or (not self.identity and self.dims * width > _MOST_NUMBERS):
            raise InvalidSpec(
                f"key_dims={self.dims} of keys of width {width}: choose fewer than the width, and at most "
                f"{_MOST_NUMBERS // width} for keys as wide"
            )
        if not self.identity:
            with torch.device("cpu"):
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randn(width, self.dims, generator=generator, dtype=torch.float64)
                # made on the CPU in float64, so that every device and machine rounds to the same matrix
                self.register_buffer("matrix_KP", torch.linalg.qr(drawn)[0].float(), persistent=False)

    def forward(self, keys: Tensor) -> Tensor:
        """Keys [..., K] -> [..., dims], float32 or the wider type given."""
        wide = keys if keys.dtype == torch.float64 else keys.float()
        if self.identity:
            return wide
        flat = wide.reshape(-1, wide.shape[-1])
        # blocks of one size: a matrix product's rounding depends on its shape, and must not on how rows arrived
        padded = pad(flat, (0, 0, 0, -len(flat) % _BLOCK_ROWS))
        matrix = self.matrix_KP.to(wide.dtype)
        parts = [padded[i : i + _BLOCK_ROWS] @ matrix for i in range(0, len(padded), _BLOCK_ROWS)]
        projected = torch.cat([flat[:0, : self.dims], *parts])[: len(flat)]
        return normalize(projected, dim=-1).reshape(*keys.shape[:-1], self.dims)
