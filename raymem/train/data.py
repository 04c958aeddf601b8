"""A bank's rows as lessons: the first four fifths to learn from, the rest held out for the figures.

Shape legend: `N` rows, `K` key width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from raymem.encode.encoder import Encoder
from raymem.errors import Conflict, InvalidInput
from raymem.memory.base import EncodedRows, Memory
from raymem.storage.store import ColdStore, Entry

LEARNED_SHARE = 0.8
# candidates among which the next token must be
CANDIDATES = 8
_READ_ROWS = 64
_ROWS_BEFORE = 4096


@dataclass(frozen=True)
class Lessons:
    """Rows of a journal up to position `end` as the bank's mechanism saw them, oldest first.

    `split` is how many of them are learned from; `digest` tells these rows from any others; `sources` (stream, run) is
    what `rows.source_N` indexes.
    """

    rows: EncodedRows
    split: int
    end: int
    digest: str
    sources: list[tuple[str, str]]

    @property
    def held(self) -> int:
        """How many rows are held out."""
        return len(self.rows) - self.split


def lessons_of(cold: ColdStore, entry: Entry, max_rows: int, least: int, end: int | None = None) -> Lessons:
    """Read and encode a bank's newest rows; the bank may be hot or cold, nothing is changed.

    Args:
        cold: the store.
        entry: the bank.
        max_rows: journal rows at most.
        least: rows that training needs.
        end: the journal position up to which to read; its present end by default.

    Raises:
        InvalidInput: too few rows, saying how many are needed.
    """
    journal = cold.journal(entry)
    end = journal.end() if end is None else end
    encoder = Encoder(entry.spec, cold.calibrations.load(entry.spec.fingerprint.calibration))
    digest, parts = hashlib.sha256(), []
    for piece in journal.scan(max(0, end - max_rows), end):
        digest.update(piece.pos_T.numpy().tobytes() + piece.crc_T.numpy().tobytes())
        parts.append(encoder.push(piece))
    count = sum(len(part) for part in parts)
    if count < least:
        raise InvalidInput(
            f"bank {entry.name!r} has {count} rows that a memory can learn from (of {end} journaled), and training "
            f"needs {least}: write more text to it first"
        )
    return Lessons(joined(parts), int(count * LEARNED_SHARE), end, digest.hexdigest(), encoder.sources)


def require_same(lessons: Lessons, digest: str) -> None:
    """Refuse to go on with other rows than a checkpoint was made with.

    Raises:
        Conflict: rows were erased, or this is another bank.
    """
    if lessons.digest != digest:
        raise Conflict(
            "the journal's rows are not those that the unfinished training saw; start anew: raymem train … --fresh"
        )


def joined(parts: list[EncodedRows]) -> EncodedRows:
    """Consecutive rows as one."""
    columns = [
        torch.cat([getattr(part, name) for part in parts])
        for name in ("keys_NK", "tokens_N", "pos_N", "seq_N", "source_N")
    ]
    values = [part.values_NV for part in parts if part.values_NV is not None]
    return EncodedRows(columns[0], columns[1], torch.cat(values) if values else None, *columns[2:])


def part_of(rows: EncodedRows, start: int, stop: int) -> EncodedRows:
    """Rows [start, stop)."""
    values = None if rows.values_NV is None else rows.values_NV[start:stop]
    origin = (column[start:stop] for column in (rows.pos_N, rows.seq_N, rows.source_N))
    return EncodedRows(rows.keys_NK[start:stop], rows.tokens_N[start:stop], values, *origin)


def windows(values_N: Tensor, starts_G: Tensor, length: int) -> Tensor:
    """Stretches `[G, length, ...]` of rows from each start."""
    return values_N[starts_G[:, None] + torch.arange(length)]


@torch.no_grad()
def hits(memory: Memory, lessons: Lessons) -> float:
    """Share of the held-out rows whose next token is among the best 8 candidates before they are written themselves.

    Up to 4,096 rows before them are written first; reading and writing take turns of 64 rows.
    """
    before = part_of(lessons.rows, max(0, lessons.split - _ROWS_BEFORE), lessons.split)
    state, found = memory.absorb(memory.empty(), before), 0
    for start in range(lessons.split, len(lessons.rows), _READ_ROWS):
        rows = part_of(lessons.rows, start, start + _READ_ROWS)
        tokens_Qk = memory.lookup(state, rows.keys_NK, CANDIDATES).tokens_Qk
        found += int((tokens_Qk == rows.tokens_N[:, None]).any(1).sum())
        state = memory.absorb(state, rows)
    return found / lessons.held
