"""Positions that a journal no longer has because their rows were erased: what tells an erasure from a loss.

Shape legend: `T` rows, `R` ranges.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from raymem.errors import Corrupt
from raymem.rows import journal_schema
from raymem.types import DTYPES, BankSpec

Ints = NDArray[np.int64]
TOMBSTONES = b"raymem.holes"
# more positions than a journal can ever give
_MOST = 2**53


def _none() -> Ints:
    return np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class Tombstones:
    """Erased positions, as ranges `[R, 2]` from, to (exclusive), ascending and apart; `end` no row may lie before.

    A journal's rows have every position but these: a row more or a row less is damage. Positions are given once, so a
    journal whose last rows were erased goes on at `end`.
    """

    ranges_R2: Ints = field(default_factory=_none)
    end: int = 0

    @classmethod
    def of(cls, positions: Iterable[int] | Tensor, end: int) -> Tombstones:
        """Tombstones at these positions of a journal that has given `end` positions out."""
        listed = positions.tolist() if isinstance(positions, Tensor) else list(positions)
        pos = np.unique(np.array(listed, dtype=np.int64))
        if not len(pos):
            return cls(end=end)
        cuts = np.flatnonzero(np.diff(pos) != 1)
        starts, stops = pos[np.r_[0, cuts + 1]], pos[np.r_[cuts, len(pos) - 1]] + 1
        return cls(np.stack([starts, stops], axis=1), end)

    def __len__(self) -> int:
        return int((self.ranges_R2[:, 1] - self.ranges_R2[:, 0]).sum())

    def __bool__(self) -> bool:
        return len(self) > 0

    def __or__(self, other: Tombstones) -> Tombstones:
        """The positions of both."""
        both_R2, end = np.concatenate([self.ranges_R2, other.ranges_R2]), max(self.end, other.end)
        if not len(both_R2):
            return Tombstones(end=end)
        both_R2 = both_R2[np.argsort(both_R2[:, 0], kind="stable")]
        reach_R = np.maximum.accumulate(both_R2[:, 1])
        # a range that begins behind all that came before it is one of its own
        apart = np.flatnonzero(both_R2[1:, 0] > reach_R[:-1])
        starts, stops = both_R2[np.r_[0, apart + 1], 0], reach_R[np.r_[apart, len(reach_R) - 1]]
        return Tombstones(np.stack([starts, stops], axis=1), end)

    def __sub__(self, other: Tombstones) -> Tombstones:
        """The positions that the other has not."""
        free_R2 = np.r_[0, other.ranges_R2.reshape(-1), _MOST].reshape(-1, 2)
        firsts = np.searchsorted(free_R2[:, 1], self.ranges_R2[:, 0], side="right")
        lasts = np.searchsorted(free_R2[:, 0], self.ranges_R2[:, 1], side="left")
        cut = [
            np.clip(free_R2[first:last], start, stop)
            for first, last, (start, stop) in zip(firsts, lasts, self.ranges_R2.tolist(), strict=True)
        ]
        return Tombstones(np.concatenate(cut), self.end) if cut else Tombstones(end=self.end)

    def until(self, pos: int) -> Tombstones:
        """The positions before `pos`, of a journal that has given out so many."""
        return Tombstones(np.minimum(self.ranges_R2[self.ranges_R2[:, 0] < pos], pos), pos)

    def spread(self, most: int) -> list[int]:
        """Evenly spread positions of these, about `most` of them, ascending."""
        nth_T = np.arange(0, len(self), max(1, -(-len(self) // most)))
        before_R = np.cumsum(np.r_[0, np.diff(self.ranges_R2, axis=1)[:, 0]])
        place_T = np.searchsorted(before_R, nth_T, side="right") - 1
        listed: list[int] = (self.ranges_R2[place_T, 0] + nth_T - before_R[place_T]).tolist()
        return listed

    @property
    def first(self) -> int:
        """The first erased position; `end` if there is none."""
        return int(self.ranges_R2[0, 0]) if len(self.ranges_R2) else self.end

    def has(self, pos_T: Ints) -> NDArray[np.bool_]:
        """Which of these positions were erased."""
        if not len(self.ranges_R2):
            return np.zeros(len(pos_T), dtype=np.bool_)
        place_T = np.searchsorted(self.ranges_R2[:, 0], pos_T, side="right") - 1
        return np.asarray((place_T >= 0) & (pos_T < self.ranges_R2[place_T, 1]))

    def rank(self, pos_T: Ints) -> Ints:
        """How many rows there should be before each position."""
        lengths = np.diff(self.ranges_R2, axis=1)[:, 0]
        before = np.r_[0, np.cumsum(lengths)]
        place_T = np.searchsorted(self.ranges_R2[:, 0], pos_T, side="right")
        inside_T = np.zeros(len(pos_T), dtype=np.int64)
        if len(lengths):
            over_T = self.ranges_R2[place_T - 1, 1] - pos_T
            inside_T = np.where((place_T > 0) & (over_T > 0), over_T, 0)
        return np.asarray(pos_T - before[place_T] + inside_T)

    def next(self, pos: int) -> int:
        """The first position from `pos` on that was not erased."""
        inside = np.flatnonzero((self.ranges_R2[:, 0] <= pos) & (pos < self.ranges_R2[:, 1]))
        return int(self.ranges_R2[inside[0], 1]) if len(inside) else pos

    def wrong(self, pos_T: Tensor, expect: int) -> int | None:
        """Index of the first row that is not the next one there should be from position `expect` on."""
        pos = pos_T.numpy()
        wanted_T = int(self.rank(np.array([expect]))[0]) + np.arange(len(pos))
        bad = np.flatnonzero((self.rank(pos) != wanted_T) | self.has(pos))
        return int(bad[0]) if len(bad) else None

    def encode(self) -> bytes:
        """Text of the shortest kind: rows erased here and there must not make every commit's manifest large."""
        flat = np.diff(np.r_[0, self.ranges_R2.reshape(-1), self.end]).astype("<i8")
        return base64.b64encode(zlib.compress(flat.tobytes()))

    @classmethod
    def decode(cls, text: bytes, most: int | None = None) -> Tombstones:
        """What `encode` wrote.

        Args:
            text: base64.
            most: ranges there can be, where the text comes from elsewhere: no more is unfolded.

        Raises:
            Corrupt: it did not write that.
        """
        unfold = zlib.decompressobj()
        try:
            # a bound of 0 would be none
            packed = unfold.decompress(base64.b64decode(text), 0 if most is None else 16 * most + 8)
            if not unfold.eof:
                raise ValueError("it is cut short, or longer than the journal has rows for")
            steps = np.frombuffer(packed, dtype="<i8")
            flat = np.cumsum(steps)
            found = cls(flat[:-1].reshape(-1, 2).astype(np.int64), int(flat[-1]))
            # the first range may begin at 0 and the last end where the journal does; all else goes forward
            if (steps < 0).any() or (steps[1:-1] == 0).any() or (flat < 0).any() or found.end > _MOST:
                raise ValueError(f"its positions are not ascending ones up to {_MOST}")
        except (ValueError, IndexError, zlib.error) as error:
            raise Corrupt(f"the record of a journal's erased positions is damaged ({error})") from error
        return found


NO_TOMBSTONES = Tombstones()


def bank_schema(spec: BankSpec, tombstones: Tombstones | None = None) -> pa.Schema:
    """The Arrow schema of a bank's journal; where rows were erased, its metadata says which positions have none."""
    fingerprint = spec.fingerprint
    schema = journal_schema(DTYPES[fingerprint.dtype], len(fingerprint.layers), fingerprint.width)
    return schema.with_metadata({**schema.metadata, TOMBSTONES: tombstones.encode()}) if tombstones else schema
