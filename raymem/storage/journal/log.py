"""The log: one table in which a host commits small groups of rows of all its banks together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from raymem.errors import Corrupt, NotOwner
from raymem.rows import JournalRows
from raymem.storage.catalog import Entry
from raymem.storage.journal.tombstones import bank_schema
from raymem.storage.tables.disk import FolderLock, reading
from raymem.storage.tables.single_writer_table import SingleWriterTable, WriterState
from raymem.storage.tables.tables import Tables, log_table, quote

_COMPACT_EVERY = 128
# past this many the log is left alone, and rows go to their banks' own tables
_FRAGMENTS = 1_400
# everything that is left after compaction fits one fragment
_FRAGMENT_ROWS = 2**20
_CACHE_BYTES = 128 * 2**20
# tensors are bytes here, because each bank has a width of its own; `lsn` counts the log's commits
LOG_SCHEMA = pa.schema(
    [
        pa.field("lsn", pa.int64(), nullable=False),
        pa.field("bank", pa.string(), nullable=False),
        pa.field("generation", pa.int64(), nullable=False),
        pa.field("pos", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("stream", pa.string(), nullable=False),
        pa.field("run", pa.string(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("token", pa.int64(), nullable=False),
        pa.field("hidden", pa.large_binary(), nullable=False),
        pa.field("value", pa.large_binary()),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
    ]
)
Part = tuple[Entry, JournalRows]


@dataclass
class _Held:
    """One bank's rows that are in the log and not in its own table: by the log's commit, oldest first."""

    parts: list[tuple[int, JournalRows]] = field(default_factory=list)
    nbytes: int = 0
    since: float = 0.0


class Log:
    """A host incarnation's log, and in memory the rows in it that were not flushed to their banks' own tables.

    It has one writer in all its life: an owner that takes a bank over from this incarnation fences the whole log first,
    and from then on every commit of this one fails. Its `state`, which changes under `_writing` alone:

    - READY: the table is READY and nothing is pending. What is held are the rows of all commits that were not flushed.
    - IN_DOUBT: a change of the table is under way or failed. The `_pending` rows, of commit `_lsn`, may be in the table
      and are not held yet. A caller that needs them waits for the change, and if it failed finds out what became of it.
    - LOST: the log was fenced off, or dropped. No commit will succeed, and what became of `_pending` is for the next
      owner to tell. This is the last state.

    Args:
        tables: the cold store's.
        id: the incarnation.
        limit: bytes that may be held; over it `full` is true and rows must go elsewhere.
    """

    def __init__(self, tables: Tables, id: str, limit: int = 256 * 2**20) -> None:
        self.id = id
        self.state = WriterState.IN_DOUBT
        # whether there were so many commits that `maintain` is due
        self.due = False
        self.limit = limit
        self.flushes = 0
        self._tables = tables
        self._table = SingleWriterTable(tables, log_table(id), f"log {id}", _FRAGMENT_ROWS)
        # one commits at a time; the index is read by others meanwhile
        self._writing = threading.RLock()
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._nbytes = 0
        # the last commit with rows of a bank, also flushed ones, and of those that have left
        self._last: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._lsn = 0
        self._pending: dict[str, list[JournalRows]] = {}
        self._rows = 0
        self._claim: FolderLock | None = None

    def create(self) -> None:
        """Make the table and hold it; no catalog entry may name this log before that."""
        self._table.create(LOG_SCHEMA)
        self.state = WriterState.READY
        self._claim = self._tables.lock(self._table.name)

    def let_go(self) -> None:
        """Show everyone on this machine that the incarnation is over."""
        if self._claim:
            self._claim.release()

    def commit(self, parts: Sequence[Part]) -> None:
        """Commit rows of many banks, all or none, durable when it returns.

        Raises:
            NotOwner: a bank was taken over from this incarnation; the log is lost for good.
            StorageError: some of it may be there all the same: `rows` says so once storage answers again.
        """
        with self._writing:
            if self.state is not WriterState.READY:
                self._look()
            table = to_log(self._lsn + 1, parts)
            self._lsn += 1
            for entry, rows in parts:
                self._pending.setdefault(entry.id, []).append(rows)
            with self._changing():
                self._table.add(table)

    def rows(self, bank: str) -> list[JournalRows]:
        """A bank's rows that were not flushed, in order.

        Raises:
            StorageError, NotOwner: a commit failed, and what became of it can't be told now, or ever.
        """
        if self.state is not WriterState.READY:
            with self._writing:
                self._look()
        with self._lock:
            held = self._held.get(bank)
            return [rows for _, rows in held.parts] if held else []

    def end(self, bank: str) -> int | None:
        """The position after the last of `rows`, None if there are none; other banks' commits are not waited for.

        Raises:
            As `rows`.
        """
        if bank in self._pending:
            with self._writing:
                self._look()
        with self._lock:
            held = self._held.get(bank)
            return int(held.parts[-1][1].pos_T[-1]) + 1 if held else None

    def held(self, bank: str) -> tuple[int, float]:
        """Bytes of a bank's rows that were not flushed, and seconds since the oldest of them came, or 0."""
        with self._lock:
            held = self._held.get(bank)
            return (held.nbytes, time.monotonic() - held.since) if held else (0, 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that were not flushed."""
        return self._nbytes

    @property
    def full(self) -> bool:
        """Whether rows had better go to their banks' own tables."""
        return self._nbytes >= self.limit or self._table.fragments >= _FRAGMENTS

    def oldest(self, nbytes: int) -> list[str]:
        """The banks with the oldest rows that together hold `nbytes`, or all."""
        chosen: list[str] = []
        with self._lock:
            for bank, held in sorted(self._held.items(), key=lambda item: item[1].since):
                if nbytes <= 0:
                    break
                chosen.append(bank)
                nbytes -= held.nbytes
        return chosen

    def flushed(self, bank: str, end: int) -> None:
        """A bank's own table now holds its rows up to position `end`."""
        with self._lock:
            held = self._held.get(bank)
            if held is None:
                return
            kept = [(lsn, rows) for lsn, rows in held.parts if int(rows.pos_T[-1]) >= end]
            self._nbytes -= held.nbytes
            del self._held[bank]
            self.flushes += 1
            if kept:
                nbytes = sum(rows.nbytes for _, rows in kept)
                self._held[bank] = _Held(kept, nbytes, held.since)
                self._nbytes += nbytes

    def forget(self, bank: str) -> None:
        """Let go of a bank's rows, flushed or not."""
        with self._lock:
            held = self._held.pop(bank, None)
            self._nbytes -= 0 if held is None else held.nbytes

    def leave(self, bank: str) -> None:
        """A bank whose rows were all flushed gets another owner, which may erase some: `maintain` drops them here."""
        with self._lock:
            if bank in self._last:
                self._left[bank] = self._last[bank]

    @property
    def left(self) -> bool:
        """Whether there may be rows of banks that have left."""
        return bool(self._left) and self.state is not WriterState.LOST

    def maintain(self) -> bool:
        """After 128 commits, or when banks have left, drop rows that were flushed and merge what is left.

        Returns:
            Whether it did.

        Raises:
            NotOwner: the log is lost for good. StorageError: nothing is lost.
        """
        with self._writing:
            with self._lock:
                left = dict(self._left)
            if not (left or self.due):
                return False
            also = [f" OR (bank = {quote(bank)} AND lsn <= {lsn})" for bank, lsn in left.items()]
            # of those that have left the old versions go as well
            first = self._shrink("".join(also), timedelta(0) if left else None)
            with self._lock:
                self._last = {b: lsn for b, lsn in self._last.items() if lsn >= first and lsn > left.get(b, -1)}
                self._left = {b: lsn for b, lsn in self._left.items() if b not in left}
        return True

    def purge(self, bank: str = "") -> None:
        """Drop rows that were flushed from every file now: those of `bank` even where others' older rows were not.

        Raises:
            As `maintain`.
        """
        self._shrink(f" OR (bank = {quote(bank)} AND lsn < {self._first(bank)})", timedelta(0))

    def _shrink(self, and_also: str, keep: timedelta | None) -> int:
        """Drop rows; from the commit that is returned on all are there but those that were asked for."""
        with self._writing:
            if self.state is not WriterState.READY:
                self._look()
            # rows flushed meanwhile stay
            first = self._first()
            with self._changing():
                self._table.delete(f"lsn < {first}{and_also}")
                self._table.compact(renew=False, keep=keep)
            return first

    def drop(self) -> None:
        """Delete the table; no catalog entry may name this log any more."""
        with self._writing:
            self._table.close()
            self.state = WriterState.LOST
            self._tables.drop(log_table(self.id))

    def stats(self) -> dict[str, Any]:
        """What it holds, and what its commits took."""
        table = self._table
        with self._lock:
            banks, nbytes = len(self._held), self._nbytes
        return {
            "id": self.id,
            "held_banks": banks,
            "held_bytes": nbytes,
            "fragments": table.fragments,
            "commits": table.commits,
            "compactions": table.compactions,
            "settles": self.flushes,
            "rows": self._rows,
            "sync_ms": 1e3 * table.sync_s / max(1, table.syncs),
        }

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, the table is changed, or looked at until its writer knows it; then the pending rows are held."""
        self.state = WriterState.IN_DOUBT
        try:
            yield
        except NotOwner:
            self.state = WriterState.LOST
            raise
        now = time.monotonic()
        with self._lock:
            for bank, parts in self._pending.items():
                held = self._held.setdefault(bank, _Held(since=now))
                for rows in parts:
                    held.parts.append((self._lsn, rows))
                    held.nbytes += rows.nbytes
                    self._nbytes += rows.nbytes
                    self._rows += len(rows)
                self._last[bank] = self._lsn
        self.due = self._table.loose >= _COMPACT_EVERY
        self._pending, self.state = {}, WriterState.READY

    def _look(self) -> None:
        """Be READY again: after a change that failed, find out what became of it.

        Raises:
            NotOwner: the log is LOST. StorageError: it can't be told now.
        """
        if self.state is WriterState.LOST:
            raise NotOwner(f"log {self.id} was fenced off: this incarnation of its host can write no more")
        if self.state is WriterState.READY:
            return
        # the look that moves the writer to the latest version comes last: if it fails all of this is repeated
        there = bool(self._pending) and self._is_there(self._lsn)
        with self._changing():
            landed = self._table.reopen()
            if landed and not (landed == 1 and there):
                # its positions may be other rows' by now, acknowledged as durable
                raise NotOwner(
                    f"a commit to log {self.id} that had failed landed after a look for it: take its banks over"
                )
            if not landed:
                self._pending = {}

    def _is_there(self, lsn: int) -> bool:
        with reading(f"look for commit {lsn} in log {self.id}"):
            return bool(self._tables.open(self._table.name).count_rows(f"lsn = {lsn}"))

    def _first(self, bank: str | None = None) -> int:
        """The commit with the oldest row held, of one bank or of all."""
        with self._lock:
            of = [held.parts[0][0] for name, held in self._held.items() if bank in (None, name)]
            return min(of, default=self._lsn + 1)


class OldLogs:
    """Logs of incarnations that banks are taken over from: each fenced once by this process, and read whole once."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._lock = threading.Lock()
        self._fenced: set[str] = set()
        self._cached: tuple[str, pa.Table] | None = None

    def rows(self, incarnation: str, entry: Entry) -> list[JournalRows]:
        """A bank's rows in a log, which is fenced first: no row can be added to it any more.

        Raises:
            Corrupt: the log is gone, or does not fit the bank's spec.
        """
        with self._lock:
            if incarnation not in self._fenced:
                SingleWriterTable(self._tables, log_table(incarnation), f"log {incarnation}", _FRAGMENT_ROWS).fence()
                self._cached = self._load(incarnation)
                self._fenced.add(incarnation)
            cached = self._cached
        if cached is None or cached[0] != incarnation:
            return read_log(self._tables, incarnation, entry)
        mine = (pc.field("bank") == entry.id) & (pc.field("generation") == entry.generation)
        found = cached[1].filter(mine)
        return from_log(found, entry) if len(found) else []

    def _load(self, incarnation: str) -> tuple[str, pa.Table] | None:
        table = self._tables.open(log_table(incarnation))
        with reading(f"read the log {incarnation}"):
            small = table.stats()["total_bytes"] <= _CACHE_BYTES
            return (incarnation, table.to_arrow()) if small else None


def to_log(lsn: int, parts: Sequence[Part]) -> pa.Table:
    """One commit's rows as a table of LOG_SCHEMA."""
    rows_of = [rows for _, rows in parts]
    counts = [len(rows) for rows in rows_of]
    columns = {
        name: torch.cat([getattr(rows, f"{name}_T") for rows in rows_of]).numpy()
        for name in ("pos", "seq", "token", "time", "crc")
    }
    columns["crc32c"] = columns.pop("crc").astype(np.uint32)
    columns |= {
        "lsn": np.full(sum(counts), lsn, dtype=np.int64),
        "generation": np.repeat([entry.generation for entry, _ in parts], counts),
        "epoch": np.repeat([rows.epoch for rows in rows_of], counts),
    }
    # one value a row, its bytes; none is null. those of one shape at once: most are of one model, with a single row
    alike = groupby((rows.hidden_TLD for rows in rows_of), attrgetter("dtype", "shape"))
    hidden = [torch.cat([*group]).flatten(1).contiguous().view(torch.uint8).numpy() for _, group in alike]
    lengths = np.repeat([rows.shape[1] for rows in hidden], [len(rows) for rows in hidden])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.concatenate([rows.reshape(-1) for rows in hidden]))]
    values: list[bytes | None] = []
    for rows in rows_of:
        no_value = [None] * len(rows)
        value_TV = rows.value_TV
        values += no_value if value_TV is None else [row.tobytes() for row in value_TV.contiguous().numpy()]
    named = {
        "bank": [entry.id for entry, rows in parts for _ in range(len(rows))],
        "stream": [stream for rows in rows_of for stream in rows.streams],
        "run": [run for rows in rows_of for run in rows.runs],
        "hidden": pa.Array.from_buffers(pa.large_binary(), sum(counts), buffers, null_count=0),
        "value": pa.array(values, pa.large_binary()),
    }
    return pa.table({name: (columns | named)[name] for name in LOG_SCHEMA.names}, schema=LOG_SCHEMA)


def read_log(tables: Tables, incarnation: str, entry: Entry) -> list[JournalRows]:
    """A bank's rows in an incarnation's log, flushed or not, in order.

    Raises:
        Corrupt: the log is gone (`missing` in its details) or does not fit the bank's spec.
    """
    table = tables.open(log_table(incarnation))
    where = f"bank = {quote(entry.id)} AND generation = {entry.generation}"
    with reading(f"read the rows of {entry.name} in the log {incarnation}"):
        found = table.search().where(where).to_arrow()
    return from_log(found, entry) if len(found) else []


def from_log(found: pa.Table, entry: Entry) -> list[JournalRows]:
    """One bank's rows of a log as its journal has them, in order of position.

    A commit that failed and all the same landed late can leave two with the same positions. The first one counts, and
    of the other nothing: it was never acknowledged, and half of it would be a gap in its run. One that landed twice
    counts once.
    """
    found = found.take(pa.array(_in_order(found["lsn"].to_numpy(), found["pos"].to_numpy()))).combine_chunks()
    schema = bank_schema(entry.spec)
    columns = {name: found[name] for name in schema.names}
    columns["hidden"] = _hidden(found["hidden"], schema.field("hidden").type, entry)
    values = [None if value is None else np.frombuffer(value, np.float32) for value in found["value"].to_pylist()]
    columns["value"] = pa.array(values, pa.list_(pa.float32()))
    return JournalRows.from_arrow(pa.table(columns, schema=schema))


def _in_order(lsn_N: NDArray[np.int64], pos_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the rows that count: those of each commit that begins after what counted before it."""
    order = np.lexsort((pos_N, lsn_N))
    starts = np.flatnonzero(np.diff(lsn_N[order], prepend=-1))
    counting, end = [], -1
    for rows in np.split(order, starts[1:]):
        if len(rows) and pos_N[rows[0]] > end:
            counting.append(rows[np.diff(pos_N[rows], prepend=end) > 0])
            end = pos_N[rows[-1]]
    return np.concatenate([order[:0], *counting])


def _hidden(column: pa.ChunkedArray, kind: pa.FixedSizeListType, entry: Entry) -> pa.Array:
    array = pa.concat_arrays(column.chunks)
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    width, lengths = kind.list_size * kind.value_type.bit_width // 8, np.diff(offsets)
    if (lengths != width).any():
        raise Corrupt(
            f"a row of {entry.name} in its log has {lengths[lengths != width][0]} bytes of hidden states, not {width}; "
            "restore the bank from an export or a copy of the store"
        )
    data = array.buffers()[2].slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    items = pa.Array.from_buffers(kind.value_type, len(column) * kind.list_size, [None, data])
    return pa.FixedSizeListArray.from_arrays(items, type=kind)
