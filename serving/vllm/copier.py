"""Rows from the paged cache into host memory, without making the engine wait for the copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def nothing_to_wait_for() -> None:
    """Return at once: the rows are there."""


class RowCopier:
    """Copies rows of a paged cache `[blocks, layers, block_size, width]`, on a side stream where there are streams.

    The rows are first gathered on the engine's own stream, so the cache's blocks may be reused as soon as the next
    step starts; only the copy to pinned memory runs beside it.
    """

    def __init__(self, cache: Tensor) -> None:
        self._cache = cache
        # torch's own stubs leave streams and events untyped
        cuda: Any = torch.cuda
        self._side = cuda.Stream(cache.device) if cache.is_cuda else None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: all layers of one token."""
        return self._cache.shape[1] * self._cache.shape[3] * self._cache.element_size()

    def copy(self, slots: Sequence[int]) -> tuple[Tensor, Callable[[], None]]:
        """Start copying the rows at `slots` (block * block_size + offset).

        Returns:
            The rows `[T, L, D]` in host memory, and what to call before reading them.
        """
        slots_T = torch.tensor(slots, dtype=torch.int64)
        if self._cache.is_cuda:
            slots_T = slots_T.pin_memory().to(self._cache.device, non_blocking=True)
        size = self._cache.shape[2]
        rows_TLD = self._cache[slots_T // size, :, slots_T % size]
        if self._side is None:
            return rows_TLD, nothing_to_wait_for
        return self._copy_aside(rows_TLD, self._side)

    @staticmethod
    def _copy_aside(rows_TLD: Tensor, side: Any) -> tuple[Tensor, Callable[[], None]]:
        host_TLD = torch.empty_like(rows_TLD, device="cpu", pin_memory=True)
        side.wait_stream(torch.cuda.current_stream(rows_TLD.device))
        with torch.cuda.stream(side):
            host_TLD.copy_(rows_TLD, non_blocking=True)
        rows_TLD.record_stream(side)
        return host_TLD, side.record_event().synchronize
