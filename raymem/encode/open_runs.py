"""The ends of open runs: what pairing and windows still need of rows that came before.

Shape legend: `n` rows of one tail, `R` rows of all, `O` open runs, `L` layers, `D` hidden width, `V` value width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.encode.keys import Array, Floats, from_bits, to_bits
from raymem.errors import Corrupt


@dataclass(frozen=True)
class OpenRun:
    """A run's last consecutive rows, at most a window of them; none when only its attention sink has come.

    `seq`, `pos` and `value_V` are those of the last row, the one that waits for its next token.
    """

    bits_nLD: Array
    seq: int
    pos: int
    value_V: Floats

    def __len__(self) -> int:
        return len(self.bits_nLD)


@dataclass(frozen=True)
class Sizes:
    """What a bank fixes about its tails: layers, width, value width, rows at most, dtype."""

    layers: int
    width: int
    value_width: int
    window: int
    dtype: torch.dtype


class OpenRuns:
    """Tails of the open runs, the run touched longest ago first; at most `capacity` of them."""

    def __init__(self, capacity: int, sizes: Sizes) -> None:
        self._capacity = capacity
        self._sizes = sizes
        self._open: OrderedDict[int, OpenRun | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, source: int) -> bool:
        return source in self._open

    @property
    def nbytes(self) -> int:
        """Bytes of states and values held."""
        return sum(tail.bits_nLD.nbytes + tail.value_V.nbytes for tail in self._open.values() if tail is not None)

    def walk(self, source_T: NDArray[np.int64]) -> tuple[dict[int, OpenRun], NDArray[np.bool_]]:
        """Touch runs in the order of their rows, closing the least recent one whenever there are too many.

        The closing happens where it would if the rows came one by one. A `keep` must follow for each of these runs
        that is still open.

        Returns:
            The tails that these rows continue, and for each row whether it starts afresh, its run not being open.
        """
        carried: dict[int, OpenRun] = {}
        fresh_T = np.zeros(len(source_T), dtype=np.bool_)
        for start in _changes(source_T):
            source = int(source_T[start])
            if source in self._open:
                self._open.move_to_end(source)
                tail = self._open[source]
                if tail is not None:
                    carried[source] = tail
            else:
                fresh_T[start] = True
            self._open[source] = None
            if len(self._open) > self._capacity:
                self._open.popitem(last=False)
        return carried, fresh_T

    def keep(self, source: int, tail: OpenRun) -> None:
        """Set an open run's tail; its place in the order stays."""
        self._open[source] = tail

    def dump(self) -> dict[str, Tensor]:
        """All tails as tensors, in order."""
        open_runs = list(self._settled())
        sizes = self._sizes
        bits = [tail.bits_nLD for _, tail in open_runs]
        empty = to_bits(torch.zeros(0, sizes.layers, sizes.width, dtype=sizes.dtype))
        values = [tail.value_V for _, tail in open_runs]
        runs = [[source, len(tail), tail.seq, tail.pos] for source, tail in open_runs]
        return {
            "tail_hidden": from_bits(np.concatenate([empty, *bits])),
            "tail_values": torch.from_numpy(np.array(values, dtype=np.float32).reshape(len(bits), sizes.value_width)),
            "tail_runs": torch.tensor(runs, dtype=torch.int64).reshape(len(open_runs), 4),
        }

    def load(self, tensors: dict[str, Tensor], sources: int) -> None:
        """Take over what `dump` gave, for a bank of so many sources.

        Raises:
            Corrupt: a tensor is missing or does not fit; nothing was changed.
        """
        hidden_RLD, values_OV, runs_O4 = self._checked(tensors, sources)
        bits_RLD, found, row = to_bits(hidden_RLD), OrderedDict[int, OpenRun | None](), 0
        for (source, rows, seq, pos), value_V in zip(runs_O4.tolist(), values_OV.numpy(), strict=True):
            found[source] = OpenRun(bits_RLD[row : row + rows].copy(), seq, pos, value_V.copy())
            row += rows
        self._open = found

    def _settled(self) -> Iterator[tuple[int, OpenRun]]:
        for source, tail in self._open.items():
            assert tail is not None, "walk was not followed by keep"
            yield source, tail

    def _checked(self, tensors: dict[str, Tensor], sources: int) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self._sizes
        runs_O4 = checked(tensors, "tail_runs", torch.int64, (None, 4))
        source_O, rows_O = runs_O4[:, 0], runs_O4[:, 1]
        values_OV = checked(tensors, "tail_values", torch.float32, (len(runs_O4), sizes.value_width))
        shape = (int(rows_O.sum()), sizes.layers, sizes.width)
        hidden_RLD = checked(tensors, "tail_hidden", sizes.dtype, shape)
        if bool(((source_O < 0) | (source_O >= sources)).any()) or len(set(source_O.tolist())) < len(source_O):
            raise Corrupt(f"open runs {source_O.tolist()[:8]} of an encoder with {sources} runs: its state is damaged")
        if bool(((rows_O < 0) | (rows_O > sizes.window)).any()) or len(runs_O4) > self._capacity:
            raise Corrupt(
                f"{len(runs_O4)} open runs of up to {rows_O.max()} rows; this bank keeps at most "
                f"{self._capacity} of {sizes.window}: the state is damaged or another bank's"
            )
        return hidden_RLD, values_OV, runs_O4


def checked(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """A tensor of this dtype and shape (None: any).

    Raises:
        Corrupt: it is missing or another.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise Corrupt(f"the encoder's state lacks {name!r}; it has {sorted(tensors)}")
    fits = len(tensor.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        raise Corrupt(f"the encoder's {name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
    return tensor


def _changes(source_T: NDArray[np.int64]) -> list[int]:
    """Where a row's source differs from the one before it."""
    if not len(source_T):
        return []
    return [0, *(np.flatnonzero(source_T[1:] != source_T[:-1]) + 1).tolist()]
