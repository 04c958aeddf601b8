"""Which rows of a journal a saved state tells of: what an erasure looks for in a bank's snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# the rows that a mechanism keeps, and the runs that an encoder waits for the next row of
_ROWS, _OPEN_RUNS = "memory.pos", "encoder.tail_runs"


def position_tensors(names: Iterable[str]) -> list[str]:
    """The names of those tensors of a state that have positions of rows in them."""
    return [name for name in names if name in (_ROWS, _OPEN_RUNS)]


def positions(name: str, data: bytes) -> NDArray[np.int64]:
    """The positions [N] int64 in the bytes of such a tensor.

    Raises:
        ValueError: these are no bytes of it.
    """
    numbers = np.frombuffer(data, dtype="<i8")
    # an open run is its source, rows, seq and position
    return numbers if name == _ROWS else numbers.reshape(-1, 4)[:, 3]


def named_runs(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Stream and run of every run that a state with this meta names."""
    return [(stream, run) for stream, run in meta.get("encoder", {}).get("sources", [])]
