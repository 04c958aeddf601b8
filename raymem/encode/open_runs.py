"""Open runs: the last rows of each run, which pairing and windows still need, and new rows laid behind them.

Shape legend: `T` new rows, `M` new and kept rows sorted by run, `N` rows completed, `n` kept rows of one run, `R` kept
rows of all runs, `O` open runs, `L` layers, `D` hidden width, `V` value width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.encode.keys import Array, Floats, ages, from_bits, to_bits
from raymem.errors import Corrupt

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class OpenRun:
    """A run's last consecutive rows, at most a window of them; none when only its attention sink has come.

    `seq`, `pos` and `value_V` are those of the last row, which waits for its next token.
    """

    bits_nLD: Array
    seq: int
    pos: int
    value_V: Floats

    def __len__(self) -> int:
        return len(self.bits_nLD)


@dataclass(frozen=True)
class RunShape:
    """What a bank fixes about each of its open runs: layers, widths, rows at most (`window`), the states' dtype."""

    layers: int
    width: int
    value_width: int
    window: int
    dtype: torch.dtype


class OpenRuns:
    """A bank's open runs, the one touched longest ago first; at most `capacity` of them.

    A state on disk has them as the tensors `tail_hidden`, `tail_values` and `tail_runs`.
    """

    def __init__(self, capacity: int, shape: RunShape) -> None:
        self._capacity = capacity
        self._shape = shape
        # None between `walk` and `keep`
        self._open: OrderedDict[int, OpenRun | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, source: int) -> bool:
        return source in self._open

    @property
    def nbytes(self) -> int:
        """Bytes of states and values held."""
        return sum(run.bits_nLD.nbytes + run.value_V.nbytes for run in self._open.values() if run is not None)

    def walk(self, source_T: Ints) -> tuple[dict[int, OpenRun], Bools]:
        """Touch runs in the order of their rows, closing the least recent one whenever there are too many.

        A run closes where it would if the rows came one by one. A `keep` must follow for each of these runs that is
        still open.

        Returns:
            The open runs that these rows continue, and for each row whether it starts afresh, its run not being open.
        """
        continued: dict[int, OpenRun] = {}
        fresh_T = np.zeros(len(source_T), dtype=np.bool_)
        changes = np.flatnonzero(source_T[1:] != source_T[:-1]) + 1
        for start in [0, *changes.tolist()] if len(source_T) else []:
            source = int(source_T[start])
            if source in self._open:
                self._open.move_to_end(source)
                run = self._open[source]
                if run is not None:
                    continued[source] = run
            else:
                fresh_T[start] = True
            self._open[source] = None
            if len(self._open) > self._capacity:
                self._open.popitem(last=False)
        return continued, fresh_T

    def keep(self, source: int, run: OpenRun) -> None:
        """Set an open run's rows; its place in the order stays."""
        self._open[source] = run

    def dump(self) -> dict[str, Tensor]:
        """All open runs as tensors, in order."""
        shape = self._shape
        runs: list[tuple[int, OpenRun]] = []
        for source, run in self._open.items():
            assert run is not None, "walk was not followed by keep"
            runs.append((source, run))
        empty = to_bits(torch.zeros(0, shape.layers, shape.width, dtype=shape.dtype))
        values = np.array([run.value_V for _, run in runs], dtype=np.float32).reshape(len(runs), shape.value_width)
        origins = [[source, len(run), run.seq, run.pos] for source, run in runs]
        return {
            "tail_hidden": from_bits(np.concatenate([empty, *(run.bits_nLD for _, run in runs)])),
            "tail_values": torch.from_numpy(values),
            "tail_runs": torch.tensor(origins, dtype=torch.int64).reshape(len(runs), 4),
        }

    def load(self, tensors: dict[str, Tensor], sources: int) -> None:
        """Take over what `dump` gave, for a bank of so many sources.

        Raises:
            Corrupt: a tensor is missing or does not fit; nothing was changed.
        """
        shape = self._shape
        runs_O4 = checked(tensors, "tail_runs", torch.int64, (None, 4))
        source_O, rows_O = runs_O4[:, 0], runs_O4[:, 1]
        values_OV = checked(tensors, "tail_values", torch.float32, (len(runs_O4), shape.value_width))
        rows = int(rows_O.sum())
        hidden_RLD = checked(tensors, "tail_hidden", shape.dtype, (rows, shape.layers, shape.width))
        if bool(((source_O < 0) | (source_O >= sources)).any()) or len(set(source_O.tolist())) < len(source_O):
            raise Corrupt(f"open runs {source_O.tolist()[:8]} of an encoder with {sources} runs: its state is damaged")
        if bool(((rows_O < 0) | (rows_O > shape.window)).any()) or len(runs_O4) > self._capacity:
            raise Corrupt(
                f"{len(runs_O4)} open runs of up to {rows_O.max()} rows; this bank keeps at most "
                f"{self._capacity} of {shape.window}: the state is damaged or another bank's"
            )
        bits_RLD, found, first = to_bits(hidden_RLD), OrderedDict[int, OpenRun | None](), 0
        for (source, kept, seq, pos), value_V in zip(runs_O4.tolist(), values_OV.numpy(), strict=True):
            found[source] = OpenRun(bits_RLD[first : first + kept].copy(), seq, pos, value_V.copy())
            first += kept
        self._open = found


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


@dataclass(frozen=True)
class RowColumns:
    """Rows of several runs as arrays; `fresh_T` marks rows that don't continue the rows of their run before them."""

    source_T: Ints
    seq_T: Ints
    pos_T: Ints
    token_T: Ints
    bits_TLD: Array
    value_TV: Floats
    fresh_T: Bools


@dataclass(frozen=True)
class SortedRows:
    """New rows behind the open runs that they continue, sorted by run and, within a run, in order.

    `order_M` is each row's place before sorting: the first `kept` are rows of open runs. `breaks_M` marks rows that
    don't follow the row before them, `ages_M` says how many rows a window may hold at each (see `keys.ages`).
    """

    rows: RowColumns
    order_M: Ints
    kept: int
    breaks_M: Bools
    ages_M: Ints

    def completed(self, span: int) -> Ints:
        """Indices of the rows whose next token is among the new rows, in the order in which those tokens came.

        Args:
            span: only rows that end a span of this many.
        """
        seq_M = self.rows.seq_T
        follows_M = ~self.breaks_M[1:] & (seq_M[:-1] != 0) & (self.order_M[1:] >= self.kept)
        done_N = np.flatnonzero(follows_M & ((seq_M[:-1] + 1) % span == 0))
        return done_N[np.argsort(self.order_M[done_N + 1])]

    def ends(self) -> list[tuple[int, int]]:
        """Each run and the index of its last row."""
        source_M = self.rows.source_T
        last_S = np.flatnonzero(np.append(source_M[1:] != source_M[:-1], True)[: len(source_M)])
        return list(zip(source_M[last_S].tolist(), last_S.tolist(), strict=True))

    def open_run(self, last: int, window: int) -> OpenRun:
        """The open run that ends with row `last`: a copy of its last rows."""
        rows = self.rows
        first = last + 1 - min(int(self.ages_M[last]), window)
        bits_nLD, value_V = rows.bits_TLD[first : last + 1].copy(), rows.value_TV[last].copy()
        return OpenRun(bits_nLD, int(rows.seq_T[last]), int(rows.pos_T[last]), value_V)


def join(open_runs: Mapping[int, OpenRun], new: RowColumns) -> SortedRows:
    """Lay new rows behind the open runs that they continue."""
    parts = [*(_columns_of(source, run) for source, run in open_runs.items()), new]
    names, rows = RowColumns.__dataclass_fields__, new
    if len(parts) > 1:
        rows = RowColumns(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    kept = len(rows.source_T) - len(new.source_T)
    order_M = np.arange(len(rows.source_T))
    if bool((rows.source_T[1:] < rows.source_T[:-1]).any()):
        order_M = np.argsort(rows.source_T, kind="stable")
        rows = RowColumns(*(getattr(rows, name)[order_M] for name in names))
    breaks_M = rows.fresh_T.copy()
    breaks_M[:1] = True
    breaks_M[1:] |= (rows.source_T[1:] != rows.source_T[:-1]) | (rows.seq_T[1:] != rows.seq_T[:-1] + 1)
    return SortedRows(rows, order_M, kept, breaks_M, ages(breaks_M, rows.seq_T == 0))


def _columns_of(source: int, run: OpenRun) -> RowColumns:
    rows = len(run)
    # tokens of kept rows, and values and positions of all but the last one, have been used already
    value_nV = np.zeros((rows, len(run.value_V)), dtype=np.float32)
    value_nV[rows - 1 :] = run.value_V
    return RowColumns(
        source_T=np.full(rows, source),
        seq_T=np.arange(run.seq + 1 - rows, run.seq + 1),
        pos_T=np.full(rows, run.pos),
        token_T=np.full(rows, -1),
        bits_TLD=run.bits_nLD,
        value_TV=value_nV,
        fresh_T=np.zeros(rows, dtype=np.bool_),
    )
