"""Rows of many banks in one table: how a log keeps what each bank's own table would."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.errors import Corrupt
from raymem.rows import JournalRows
from raymem.storage.catalog import Entry
from raymem.storage.journal.tombstones import bank_schema
from raymem.storage.tables.disk import reading
from raymem.storage.tables.tables import Tables, log_table, quote

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


def to_log(lsn: int, parts: Sequence[Part]) -> pa.Table:
    """One commit's rows as a table of LOG_SCHEMA."""
    counts = [len(rows) for _, rows in parts]

    def each(values: Sequence[object]) -> list[object]:
        return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]

    def cat(tensors: Sequence[Tensor]) -> np.ndarray:
        return torch.cat(list(tensors)).numpy()

    everything = [rows for _, rows in parts]
    columns = {
        "lsn": np.full(sum(counts), lsn, dtype=np.int64),
        "bank": each([entry.id for entry, _ in parts]),
        "generation": np.repeat([entry.generation for entry, _ in parts], counts),
        "pos": cat([rows.pos_T for rows in everything]),
        "epoch": np.repeat([rows.epoch for rows in everything], counts),
        "stream": [stream for rows in everything for stream in rows.streams],
        "run": [run for rows in everything for run in rows.runs],
        "seq": cat([rows.seq_T for rows in everything]),
        "token": cat([rows.token_T for rows in everything]),
        "hidden": _binary([rows.hidden_TLD for rows in everything]),
        "value": _values(everything),
        "time": cat([rows.time_T for rows in everything]),
        "crc32c": cat([rows.crc_T for rows in everything]).astype(np.uint32),
    }
    return pa.table(columns, schema=LOG_SCHEMA)


def read_log(tables: Tables, incarnation: str, entry: Entry) -> list[JournalRows]:
    """A bank's rows in an incarnation's log, flushed or not, in order.

    Raises:
        Corrupt: the log is gone (`missing` in its details) or does not fit the bank's spec.
    """
    table = tables.open(log_table(incarnation))
    where = f"bank = {quote(entry.id)} AND generation = {entry.generation}"
    with reading(f"read the rows of {entry.name} in the log {incarnation}"):
        found = table.search().where(where).to_arrow()
    return from_log(found, entry)


def from_log(found: pa.Table, entry: Entry) -> list[JournalRows]:
    """One bank's rows of a log as its journal has them, in order of position.

    A commit that failed and all the same landed late can leave two with the same positions. The first one counts, and
    of the other nothing: it was never acknowledged, and half of it would be a gap in its run. One that landed twice
    counts once.
    """
    found = found.take(pa.array(_in_order(found["lsn"].to_numpy(), found["pos"].to_numpy()))).combine_chunks()
    schema = bank_schema(entry.spec)
    columns = {name: found[name] for name in schema.names if name not in ("hidden", "value")}
    columns["hidden"] = _fixed(found["hidden"], schema.field("hidden").type, entry)
    columns["value"] = _lists(found["value"])
    return JournalRows.from_arrow(pa.table({name: columns[name] for name in schema.names}, schema=schema))


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


def _binary(tensors: Sequence[Tensor]) -> pa.Array:
    """One value a row: the bytes of each tensor's rows, none of which is null."""
    # those of one width at once: most are of one model, and many have a single row
    alike = [torch.cat(list(group)) for _, group in groupby(tensors, lambda each: (each.dtype, each.shape[1:]))]
    rows = [tensor.flatten(1).contiguous().view(torch.uint8) for tensor in alike]
    lengths = np.repeat([row.shape[1] for row in rows], [row.shape[0] for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    data = torch.cat([row.reshape(-1) for row in rows]).numpy()
    return pa.Array.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(data)], null_count=0
    )


def _values(parts: Sequence[JournalRows]) -> pa.Array:
    values: list[bytes | None] = []
    for rows in parts:
        if rows.value_TV is None:
            values.extend([None] * len(rows))
        else:
            values.extend(row.tobytes() for row in rows.value_TV.contiguous().numpy())
    return pa.array(values, pa.large_binary())


def _bytes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Buffer]:
    """A binary column's lengths and its bytes without gaps."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2] or pa.py_buffer(b"")
    return np.diff(offsets), data.slice(int(offsets[0]), int(offsets[-1] - offsets[0])) if len(offsets) else data


def _fixed(column: pa.ChunkedArray, kind: pa.FixedSizeListType, entry: Entry) -> pa.Array:
    width = kind.list_size * kind.value_type.bit_width // 8
    if not len(column):
        return pa.array([], kind)
    lengths, data = _bytes(column)
    if (lengths != width).any():
        raise Corrupt(
            f"a row of {entry.name} in its log has {lengths[lengths != width][0]} bytes of hidden states, not {width}; "
            "restore the bank from an export or a copy of the store"
        )
    items = pa.Array.from_buffers(kind.value_type, len(column) * kind.list_size, [None, data])
    return pa.FixedSizeListArray.from_arrays(items, type=kind)


def _lists(column: pa.ChunkedArray) -> pa.Array:
    return pa.array(
        [None if value is None else np.frombuffer(value, dtype=np.float32) for value in column.to_pylist()],
        pa.list_(pa.float32()),
    )
