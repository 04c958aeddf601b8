"""New rows laid behind the tails of their runs, sorted by run: where pairs, gaps and windows are seen.

Shape legend: `T` new rows, `M` new and kept rows sorted by run, `N` rows completed, `L` layers, `D` hidden width,
`V` value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymem.encode import keys
from raymem.encode.open_runs import OpenRun

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Rows of one run after another, or interleaved; `fresh_T` marks rows that don't continue what came before."""

    source_T: Ints
    seq_T: Ints
    pos_T: Ints
    token_T: Ints
    bits_TLD: keys.Array
    value_TV: keys.Floats
    fresh_T: NDArray[np.bool_]


@dataclass(frozen=True)
class Merged:
    """A batch behind its tails, sorted by run and, within a run, in order.

    `order_M` is each row's place before sorting, where the first `kept` came from tails.
    """

    rows: Batch
    order_M: Ints
    kept: int
    breaks_M: NDArray[np.bool_]
    ages_M: Ints

    def completed(self, span: int) -> Ints:
        """Indices of the rows whose next token came with this batch, in the order in which those tokens came.

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

    def tail(self, last: int, window: int) -> OpenRun:
        """The tail that ends with this row: a copy."""
        rows = self.rows
        first = last + 1 - min(int(self.ages_M[last]), window)
        bits_nLD, value_V = rows.bits_TLD[first : last + 1].copy(), rows.value_TV[last].copy()
        return OpenRun(bits_nLD, int(rows.seq_T[last]), int(rows.pos_T[last]), value_V)


def merge(open_runs: Mapping[int, OpenRun], batch: Batch) -> Merged:
    """Lay a batch behind the tails that it continues."""
    parts = [*(_of_tail(source, tail) for source, tail in open_runs.items()), batch]
    rows = parts[0] if len(parts) == 1 else _joined(parts)
    kept = len(rows.source_T) - len(batch.source_T)
    order_M = np.arange(len(rows.source_T))
    if bool((rows.source_T[1:] < rows.source_T[:-1]).any()):
        order_M = np.argsort(rows.source_T, kind="stable")
        rows = _taken(rows, order_M)
    breaks_M = rows.fresh_T.copy()
    breaks_M[:1] = True
    breaks_M[1:] |= (rows.source_T[1:] != rows.source_T[:-1]) | (rows.seq_T[1:] != rows.seq_T[:-1] + 1)
    return Merged(rows, order_M, kept, breaks_M, keys.ages(breaks_M, rows.seq_T == 0))


def _of_tail(source: int, tail: OpenRun) -> Batch:
    rows = len(tail)
    # tokens of kept rows, and values and positions of all but the last one, have been used already
    value_nV = np.zeros((rows, len(tail.value_V)), dtype=np.float32)
    value_nV[rows - 1 :] = tail.value_V
    return Batch(
        source_T=np.full(rows, source),
        seq_T=np.arange(tail.seq + 1 - rows, tail.seq + 1),
        pos_T=np.full(rows, tail.pos),
        token_T=np.full(rows, -1),
        bits_TLD=tail.bits_nLD,
        value_TV=value_nV,
        fresh_T=np.zeros(rows, dtype=np.bool_),
    )


def _joined(parts: list[Batch]) -> Batch:
    return Batch(*(np.concatenate([getattr(part, name) for part in parts]) for name in Batch.__dataclass_fields__))


def _taken(batch: Batch, order: Ints) -> Batch:
    return Batch(*(getattr(batch, name)[order] for name in Batch.__dataclass_fields__))
