"""Rows of several journals as those of one: in the order of their times, under names that say where they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raymem.rows import JournalRows, checksums
from raymem.types import check_label

_BATCH_ROWS = 4096
_NAMED = 100


@dataclass
class Tally:
    """What happened to rows that two journals have under one name: the same content twice, or another."""

    duplicates: int = 0
    conflicts: int = 0
    named: list[str] = field(default_factory=list)

    def conflict(self, source: str, stream: str, run: str, seq: int) -> None:
        """Count a row that is left out, and name the first of them."""
        self.conflicts += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{source}: stream {stream!r} run {run!r} row {seq}")


def interleave(journals: Sequence[Iterable[JournalRows]]) -> Iterator[tuple[int, JournalRows]]:
    """Pieces of the journals with the index of each one's journal, by (time, journal, position).

    A row's time is the latest that its journal has had up to it, so that a journal's own order always stays.
    """
    heads = [_Cursor(index, iter(rows)) for index, rows in enumerate(journals)]
    heads = [head for head in heads if head.more()]
    while heads:
        first = min(heads, key=lambda head: head.place)
        bound = min((head.place for head in heads if head is not first), default=(np.inf, len(journals)))
        yield first.index, first.take(bound)
        if not first.more():
            heads.remove(first)


class _Cursor:
    """How far one journal has been read."""

    def __init__(self, index: int, rows: Iterator[JournalRows]) -> None:
        self.index = index
        self._source = rows
        self._rows: JournalRows | None = None
        self._when_T: NDArray[np.float64] = np.zeros(0)
        self._at = 0
        self._latest = -np.inf

    @property
    def place(self) -> tuple[float, int]:
        return float(self._when_T[self._at]), self.index

    def more(self) -> bool:
        """Whether there is a next row, read if need be."""
        while self._rows is None or self._at == len(self._rows):
            self._rows = next(self._source, None)
            if self._rows is None:
                return False
            self._when_T = np.maximum(np.maximum.accumulate(self._rows.time_T.numpy()), self._latest)
            self._latest, self._at = self._when_T[-1], 0
        return True

    def take(self, bound: tuple[float, int]) -> JournalRows:
        """The rows at hand that come before a place."""
        assert self._rows is not None
        side = "right" if self.index < bound[1] else "left"
        start, self._at = self._at, int(np.searchsorted(self._when_T, bound[0], side))  # type: ignore[call-overload]
        return self._rows.part(start, self._at)


def merged(
    journals: Sequence[Iterable[JournalRows]], names: Sequence[str], prefixes: Sequence[str], tally: Tally
) -> Iterator[pa.Table]:
    """The rows of one journal made of several, in tables of some thousand.

    Args:
        journals: each one's rows in order.
        names: of the banks they belong to.
        prefixes: put before each one's streams; where they are empty, rows of the same name are told apart by content:
            the first stays.
        tally: where rows that are left out are counted.
    """
    known: dict[tuple[str, str], dict[int, int]] = {}
    pos, tables, waiting = 0, list[pa.Table](), 0
    for index, piece in interleave(journals):
        if not prefixes[index]:
            piece = _new(piece, known, names[index], tally)
        if not len(piece):
            continue
        tables.append(_renamed(piece, prefixes[index], pos).to_arrow())
        pos, waiting = pos + len(piece), waiting + len(piece)
        if waiting >= _BATCH_ROWS:
            yield pa.concat_tables(tables).combine_chunks()
            tables, waiting = [], 0
    if tables:
        yield pa.concat_tables(tables).combine_chunks()


def _new(rows: JournalRows, known: dict[tuple[str, str], dict[int, int]], source: str, tally: Tally) -> JournalRows:
    fresh = []
    columns = (rows.streams, rows.runs, rows.seq_T.tolist(), rows.crc_T.tolist())
    for row, (stream, run, seq, crc) in enumerate(zip(*columns, strict=True)):
        sums = known.setdefault((stream, run), {})
        if sums.get(seq) == crc:
            tally.duplicates += 1
        elif seq in sums or (sums and seq < next(reversed(sums))):
            # other content, or a row that comes after later ones of its run
            tally.conflict(source, stream, run, seq)
        else:
            sums[seq] = crc
            fresh.append(row)
    return rows if len(fresh) == len(rows) else rows.pick(fresh)


def _renamed(rows: JournalRows, prefix: str, pos: int) -> JournalRows:
    pos_T = torch.arange(pos, pos + len(rows), dtype=torch.int64)
    if not prefix:
        return dataclasses.replace(rows, pos_T=pos_T, epoch=0)
    for stream in set(rows.streams):
        check_label("stream", prefix + stream)
    # however a name is spelled, it stays so: two spellings may be two streams of an earlier version
    streams = [prefix + stream for stream in rows.streams]
    crc_T = checksums(streams, rows.runs, rows.seq_T, rows.token_T, rows.hidden_TLD, rows.value_TV)
    return dataclasses.replace(rows, pos_T=pos_T, epoch=0, streams=streams, crc_T=crc_T)
