"""Rows that are durable and not yet part of a bank's state: few enough that whoever looks at it applies them first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from raymem.cold.rows import JournalRows, concat

# a write of so few bytes takes less time than a hop to a thread, and is applied together with others
SMALL_BYTES = 64 * 2**10
# applying so many takes about twice as long as applying one
_MOST_ROWS = 64
# a bank that nobody looks at is brought up to date after so long, so that its next reader need not wait
_MOST_S = 10.0


class Backlog:
    """Small groups of committed rows of one bank, in order.

    One thread adds; any may apply. The seq that continues a run is known here until the state knows it.
    """

    def __init__(self) -> None:
        self._parts: list[JournalRows] = []
        self._heads: dict[tuple[str, str], int] = {}
        self._end: int | None = None
        self._rows = self._nbytes = 0
        self._since = 0.0
        # one applies at a time; what is here may be looked at meanwhile
        self._applying = threading.Lock()
        self._lock = threading.Lock()

    def add(self, rows: JournalRows) -> None:
        """Take rows that follow those that are here."""
        with self._lock:
            self._since = self._since if self._parts else time.monotonic()
            self._parts.append(rows)
            self._count(rows)

    def head(self, stream: str, run: str) -> int | None:
        """The seq that continues a run, None if it has no row here."""
        return self._heads.get((stream, run))

    @property
    def end(self) -> int | None:
        """The position after the last row here, None if there is none."""
        return self._end

    @property
    def due(self) -> bool:
        """Whether they had better be applied although nobody looks."""
        if not self._parts:
            return False
        full = self._rows >= _MOST_ROWS or self._nbytes >= SMALL_BYTES
        return full or time.monotonic() - self._since >= _MOST_S

    def apply(self, function: Callable[[JournalRows], None]) -> None:
        """Let `function` apply all that are here; whoever comes meanwhile waits for it."""
        if not self._parts:
            return
        with self._applying:
            with self._lock:
                parts = list(self._parts)
            if parts:
                function(concat(parts))
                self._drop(len(parts))

    def clear(self) -> None:
        """Drop them: another state has them already."""
        with self._applying:
            self._drop(len(self._parts))

    def _drop(self, parts: int) -> None:
        with self._lock:
            self._parts, left = [], self._parts[parts:]
            self._heads, self._end, self._rows, self._nbytes, self._since = {}, None, 0, 0, time.monotonic()
            for rows in left:
                self._parts.append(rows)
                self._count(rows)

    def _count(self, rows: JournalRows) -> None:
        self._heads.update(zip(zip(rows.streams, rows.runs, strict=True), (rows.seq_T + 1).tolist(), strict=True))
        self._end = int(rows.pos_T[-1]) + 1
        self._rows += len(rows)
        self._nbytes += rows.nbytes
