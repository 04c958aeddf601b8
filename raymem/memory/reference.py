"""A key's address in a memory that never changes: weights over the rows of a fixed reference memory.

Shape legend: `S` memory rows, `K` key width; `...` banks and rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from raymem.kernels.rls_update import GRID_BITS, to_grid

Addressing = Literal["least_squares", "gaussian_filter"]
_BLOCK_ROWS = 64
# squared distance under which a key is the reference row itself: rounding of float32 unit keys
_SAME = 1e-12


class Reference(nn.Module):
    """A seeded reference memory M_ref [S, K] and the weights `w` [S] that it gives a key.

    M_ref never changes, so that a key's weights can be computed again to forget it. Its rows are unit, and orthonormal
    in blocks of K, which keeps its pseudo-inverse well conditioned; it is made on the CPU in float64 and rebuilt from
    the seed, not stored with a bank.

    Reference:
        Larimar (2403.11901) section 3: least squares `w = z M_ref^+`; appendix: Gaussian filter
        `w_k ~ exp(-|z - m_k|^2 / (2 alpha s^2))`, `s = min_k |z - m_k|`, one-hot where s is 0.
    """

    rows_SK: Tensor
    inverse_KS: Tensor

    def __init__(self, rows: int, width: int, seed: int, addressing: Addressing, filter_width: float = 1e-3) -> None:
        super().__init__()
        self.addressing = addressing
        self.filter_width = filter_width
        self.grid_bits = GRID_BITS
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(seed)
            square = [
                torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(0, rows, width)
            ]
            drawn = torch.cat([torch.linalg.qr(each)[0] for each in square])[:rows]
            self.register_buffer("rows_SK", drawn, persistent=False)
            self.register_buffer("inverse_KS", torch.linalg.pinv(drawn), persistent=False)

    def forward(self, keys: Tensor) -> Tensor:
        """Weights `[..., S]` float64 of keys `[..., K]`, on the grid that keeps their sums exact."""
        wide = keys.double()
        # blocks of one size: a matrix product's rounding depends on its shape, and must not on how rows arrived
        flat = wide.reshape(-1, wide.shape[-1])
        padded = nn.functional.pad(flat, (0, 0, 0, -len(flat) % _BLOCK_ROWS))
        blocks = torch.split(padded, _BLOCK_ROWS)
        if self.addressing == "least_squares":
            parts = [block @ self.inverse_KS for block in blocks]
        else:
            parts = [self._filter(block) for block in blocks]
        weights = torch.cat(parts)[: len(flat)]
        return to_grid(weights, self.grid_bits).reshape(*keys.shape[:-1], weights.shape[-1])

    def _filter(self, keys_NK: Tensor) -> Tensor:
        square_NS = (
            keys_NK.square().sum(-1, keepdim=True) - 2 * keys_NK @ self.rows_SK.T + self.rows_SK.square().sum(-1)
        )
        nearest_N1 = square_NS.amin(-1, keepdim=True)
        scaled_NS = (nearest_N1 - square_NS) / (2 * self.filter_width * nearest_N1.clamp_min(_SAME))
        return torch.softmax(scaled_NS, -1)
