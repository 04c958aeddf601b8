"""Deciding which rows of arriving traces are new, before they go into one commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from raymem.errors import RaymemError, SequenceConflict
from raymem.logs import get_logger
from raymem.rows import JournalRows, concat
from raymem.storage.store import Entry
from raymem.types import Ack, Trace

log = get_logger("raymem.bank.dedup")


class Runs(NamedTuple):
    """What is known of (stream, run).

    `next_seq` is the seq after the last one journaled, `find` gives checksums of journaled rows with seq in [from, to),
    `spelling` the name under which rows of a run are there already: earlier versions took others than NFC.
    """

    next_seq: Callable[[str, str], int]
    find: Callable[[str, str, int, int], dict[int, int]]
    spelling: Callable[[str, str], tuple[str, str]]


class Dedup:
    """One group of traces on its way into the journal.

    A row's identity is (stream, run, seq). Rows already there with the same checksum are acknowledged and left out;
    with another checksum, or out of order, the whole trace is refused.

    Args:
        entry: the bank.
        runs: those that the bank knows.
        pos: the journal position the first new row gets.
    """

    def __init__(self, entry: Entry, runs: Runs, pos: int) -> None:
        self._entry = entry
        self._runs = runs
        self._pos = pos
        self._staged: list[JournalRows] = []
        self._heads: dict[tuple[str, str], int] = {}
        self._sums: dict[tuple[str, str], dict[int, int]] = {}

    def add(self, trace: Trace) -> Ack | RaymemError:
        """Stage a trace's new rows; return the Ack it gets once the group is committed, or why it is refused."""
        try:
            trace.validate(self._entry.spec.fingerprint)
            return self._stage(trace)
        except RaymemError as error:
            return error
        except Exception as error:  # noqa: BLE001 - handed to the writer; those of the same group must not hear of it
            log.error("trace refused", bank=self._entry.name, error=repr(error))
            return RaymemError(f"a trace for bank {self._entry.name} could not be taken: {error!r}")

    def rows(self) -> JournalRows | None:
        """The group's new rows in order, or None if there are none."""
        return concat(self._staged) if self._staged else None

    def _stage(self, trace: Trace) -> Ack:
        run = self._runs.spelling(trace.stream, trace.run)
        if run != (trace.stream, trace.run):
            trace = dataclasses.replace(trace, stream=run[0], run=run[1])
        head = self._heads.get(run) or self._runs.next_seq(*run)
        rows = JournalRows.of(trace, self._pos, self._entry.epoch)
        known = max(0, min(head - trace.seq, len(trace)))
        if known:
            self._check(rows, known, run)
        new = _from(rows, known, self._pos)
        if len(new):
            sums = dict(zip(new.seq_T.tolist(), new.crc_T.tolist(), strict=True))
            # from here on nothing can fail half-way
            self._staged.append(new)
            self._heads[run] = trace.seq + len(trace)
            self._sums.setdefault(run, {}).update(sums)
            self._pos += len(new)
        gap = int(trace.seq > head and len(trace) > 0)
        return Ack(rows=len(new), duplicates=known, end=self._pos, gaps=gap, durable=True)

    def _check(self, rows: JournalRows, known: int, run: tuple[str, str]) -> None:
        first = int(rows.seq_T[0])
        there = self._runs.find(*run, first, first + known) | self._sums.get(run, {})
        for seq, crc in zip(rows.seq_T[:known].tolist(), rows.crc_T[:known].tolist(), strict=True):
            if seq not in there:
                raise SequenceConflict(
                    f"row {seq} of stream {run[0]!r} run {run[1]!r} comes after later rows of that run; "
                    "rows of a run must arrive in order: start a new run",
                    seq=seq,
                )
            if there[seq] != crc:
                raise SequenceConflict(
                    f"row {seq} of stream {run[0]!r} run {run[1]!r} is already there with other content; "
                    "use a new run for a new pass",
                    seq=seq,
                )


def _from(rows: JournalRows, first: int, pos: int) -> JournalRows:
    """The rows from index `first` on, numbered from `pos`."""
    if first == 0:
        return rows
    return dataclasses.replace(rows.part(first), pos_T=torch.arange(pos, pos + len(rows) - first, dtype=torch.int64))
