"""Rows that were accepted with `durable=False`: what is still to be written, and what could not be."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from raymem.errors import InvalidInput, SequenceConflict, StorageError
from raymem.logs import get_logger
from raymem.rows import Trace
from raymem.types import Ack

log = get_logger("raymem.host.owed")


class Owed:
    """The traces that a host has accepted and that are not durable yet, by the future that says when they are."""

    def __init__(self) -> None:
        self.lost_rows = 0
        self._why: BaseException | None = None
        self._traces: dict[asyncio.Future[Ack], tuple[str, Trace]] = {}

    def add(self, name: str, trace: Trace, done: asyncio.Future[Ack]) -> None:
        """A bank took a trace, and `done` is when it is durable."""
        self._traces[done] = name, trace
        done.add_done_callback(self._finish)

    def left(self) -> dict[str, list[Trace]]:
        """What each bank has not written, in order."""
        found: defaultdict[str, list[Trace]] = defaultdict(list)
        for name, trace in self._traces.values():
            found[name].append(trace)
        return dict(found)

    def resolve(self, name: str, outcomes: Sequence[Ack | BaseException]) -> None:
        """What came of a bank's traces that were `left`."""
        mine = [done for done, (owner, _) in self._traces.items() if owner == name]
        for done, outcome in zip(mine, outcomes, strict=True):
            self._count(*self._traces.pop(done), outcome if isinstance(outcome, BaseException) else None)

    def require_paid(self) -> None:
        """Raise StorageError if rows were lost, or are left where nothing writes any more."""
        lost = self.lost_rows + sum(len(trace) for _, trace in self._traces.values())
        if lost:
            raise StorageError(
                f"{lost} rows that were accepted with durable=False could not be written, the last because: "
                f"{self._why or 'their bank was gone'}; write them again, and let durable be True where they matter",
                rows=lost,
            )

    def _finish(self, done: asyncio.Future[Ack]) -> None:
        # what was cancelled went with its event loop, and is written as the process ends
        if not done.cancelled() and (found := self._traces.pop(done, None)) is not None:
            self._count(*found, done.exception())

    def _count(self, name: str, trace: Trace, error: BaseException | None) -> None:
        if error is None:
            return
        log.warning("a write that was not waited for failed", bank=name, rows=len(trace), error=str(error))
        # what was refused for what it is would be so again
        if not isinstance(error, InvalidInput | SequenceConflict):
            self.lost_rows += len(trace)
            self._why = error
