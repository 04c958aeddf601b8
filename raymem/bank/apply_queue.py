"""Rows that are durable and not yet part of a bank's state: few enough that whoever looks at it applies them first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import NamedTuple

from raymem.rows import JournalRows, concat

# a write of so few bytes takes less time than a hop to a thread, and is applied together with others
SMALL_BYTES = 64 * 2**10
# applying so many takes about twice as long as applying one
_MOST_ROWS = 64
# a bank that nobody looks at is brought up to date after so long, so that its next reader need not wait
_MOST_S = 10.0


class _Waiting(NamedTuple):
    """What waits, as one value: whoever looks sees all of a change or nothing."""

    parts: tuple[JournalRows, ...] = ()
    heads: Mapping[tuple[str, str], int] = MappingProxyType({})
    rows: int = 0
    nbytes: int = 0
    end: int | None = None
    since: float = 0.0

    def with_part(self, rows: JournalRows) -> _Waiting:
        runs = zip(rows.streams, rows.runs, strict=True)
        return _Waiting(
            (*self.parts, rows),
            {**self.heads, **dict(zip(runs, (rows.seq_T + 1).tolist(), strict=True))},
            self.rows + len(rows),
            self.nbytes + rows.nbytes,
            int(rows.pos_T[-1]) + 1,
            self.since if self.parts else time.monotonic(),
        )

    def without(self, parts: int) -> _Waiting:
        return reduce(_Waiting.with_part, self.parts[parts:], _Waiting())


class ApplyQueue:
    """Small groups of committed rows of one bank, in order.

    One thread adds; any may look, and any may apply. A run's next seq is known here until the state knows it.
    """

    def __init__(self) -> None:
        self._now = _Waiting()
        self._changing = threading.Lock()
        # one applies at a time, and others may look and add meanwhile
        self._applying = threading.Lock()

    def add(self, rows: JournalRows) -> None:
        """Take rows that follow those that are here."""
        with self._changing:
            self._now = self._now.with_part(rows)

    def head(self, stream: str, run: str) -> int | None:
        """The seq that continues a run, None if it has no row here."""
        return self._now.heads.get((stream, run))

    @property
    def end(self) -> int | None:
        """The position after the last row here, None if there is none."""
        return self._now.end

    @property
    def nbytes(self) -> int:
        """Bytes of what waits."""
        return self._now.nbytes

    @property
    def due(self) -> bool:
        """Whether they had better be applied although nobody looks."""
        now = self._now
        full = now.rows >= _MOST_ROWS or now.nbytes >= SMALL_BYTES
        return bool(now.parts) and (full or time.monotonic() - now.since >= _MOST_S)

    def apply(self, function: Callable[[JournalRows], None]) -> None:
        """Let `function` apply all that are here; whoever comes meanwhile waits for it. If it fails they stay."""
        if not self._now.parts:
            return
        with self._applying:
            parts = self._now.parts
            if parts:
                function(concat(parts))
                self._drop(len(parts))

    def clear(self) -> None:
        """Drop them: another state has them already."""
        with self._applying:
            self._drop(len(self._now.parts))

    def _drop(self, parts: int) -> None:
        with self._changing:
            self._now = self._now.without(parts)
