"""Attended rows as Arrow, for other readers and in bulk: a row a line, with who wrote it, its keys and its values.

Columns: `pos`, `token`, `seq`, `partition` int64; `stream`, `run` text; `keys` and `values` fixed lists, layer by
layer and head by head, int8 or bfloat16 as its uint16 bits; with int8 `key_scales` and `value_scales` of float32. The
schema's metadata says `raymem.rows`: attention layers, key/value heads, head width, RoPE and dtype, and of an answer
`raymem.memory`: relevance and kind. Keys and values are left out where a bank keeps none. What is put has neither `pos`
nor `token` nor `partition`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raymem.client.wire import MAX_BYTES
from raymem.client.wire_limits import check_arrow
from raymem.errors import Corrupt, InvalidTrace, RaymemError, TooLarge
from raymem.rows import AttendedRows, RowFormat
from raymem.tensors import from_bits, to_bits
from raymem.types import MemoryTokens

_FORMAT, _MEMORY = b"raymem.rows", b"raymem.memory"
_TENSORS = {"keys": "LNHd", "values": "LNHd", "key_scales": "LNH", "value_scales": "LNH"}


def memory_to_arrow(memory: MemoryTokens) -> bytes:
    """Rows that were chosen, as an Arrow IPC stream of one batch."""
    names = [memory.sources[source] for source in memory.source_N.tolist()]
    columns = {
        "pos": pa.array(memory.pos_N.numpy()),
        "token": pa.array(memory.tokens_N.numpy()),
        "seq": pa.array(memory.seq_N.numpy()),
        "stream": pa.array([stream for stream, _ in names], pa.string()),
        "run": pa.array([run for _, run in names], pa.string()),
    }
    if memory.partition_N is not None:
        columns["partition"] = pa.array(memory.partition_N.numpy())
    metadata = {_MEMORY: json.dumps({"relevance": memory.relevance, "kind": memory.kind})}
    if memory.keys_LNHd is not None and memory.values_LNHd is not None:
        layers, _, heads, width = memory.keys_LNHd.shape
        form = RowFormat(layers, heads, width, "", str(memory.keys_LNHd.dtype).removeprefix("torch."))
        metadata[_FORMAT] = json.dumps(form._asdict())
        tensors = {name: getattr(memory, f"{name}_{shape}") for name, shape in _TENSORS.items()}
        columns |= {name: _lists(tensor) for name, tensor in tensors.items() if tensor is not None}
    return _stream(columns, metadata)


def memory_from_arrow(data: bytes, max_bytes: int = MAX_BYTES) -> MemoryTokens:
    """Read what `memory_to_arrow` wrote.

    Raises:
        TooLarge, Corrupt: more than allowed, or no such stream.
    """
    table, metadata = _table(data, max_bytes, ("pos", "token", "seq", "stream", "run"))
    try:
        about = json.loads(metadata[_MEMORY])
        relevance, kind = float(about["relevance"]), str(about["kind"])
    except (ValueError, LookupError, TypeError) as error:
        raise Corrupt(f"not an Arrow stream of chosen rows: {type(error).__name__}: {str(error)[:200]}") from error
    number: dict[tuple[str, str], int] = {}
    names = zip(table["stream"].to_pylist(), table["run"].to_pylist(), strict=True)
    source_N = torch.tensor([number.setdefault(name, len(number)) for name in names], dtype=torch.int64)
    tensors: dict[str, Any] = {f"{name}_{_TENSORS[name]}": each for name, each in _tensors(table, metadata).items()}
    return MemoryTokens(
        pos_N=_ints(table, "pos"),
        tokens_N=_ints(table, "token"),
        seq_N=_ints(table, "seq"),
        source_N=source_N,
        sources=tuple(number),
        relevance=relevance,
        kind=kind,
        partition_N=_ints(table, "partition") if "partition" in table.schema.names else None,
        **tensors,
    )


def rows_to_arrow(rows: AttendedRows) -> bytes:
    """Rows that are to be kept, as `AttendedRows.checked` gave them, as an Arrow IPC stream of one batch."""
    count = len(rows)
    columns = {
        "seq": pa.array(np.arange(rows.seq, rows.seq + count)),
        "stream": pa.array([rows.stream] * count, pa.string()),
        "run": pa.array([rows.run] * count, pa.string()),
    }
    columns |= {name: _lists(tensor) for name, tensor in rows.tensors().items()}
    return _stream(columns, {_FORMAT: json.dumps(rows.format._asdict())})


def rows_from_arrow(data: bytes, max_bytes: int = MAX_BYTES) -> list[AttendedRows]:
    """Read what `rows_to_arrow` wrote; rows of other runs, or after a gap, come as others.

    Raises:
        TooLarge, Corrupt: more than allowed, or no such stream. InvalidTrace: no row.
    """
    table, metadata = _table(data, max_bytes, ("seq", "stream", "run"))
    tensors = _tensors(table, metadata)
    if not len(table) or not tensors:
        raise InvalidTrace(f"an Arrow stream of {len(table)} rows with {sorted(tensors)}; give keys and values of some")
    rope = str(json.loads(metadata[_FORMAT])["rope"])
    streams, runs, seqs = (table[name].to_pylist() for name in ("stream", "run", "seq"))
    starts = [
        row
        for row in range(len(table))
        if not row or (streams[row], runs[row], seqs[row]) != (streams[row - 1], runs[row - 1], seqs[row - 1] + 1)
    ]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(table)], strict=True):
        part: dict[str, Any] = {f"{name}_{_TENSORS[name]}": each[:, start:stop] for name, each in tensors.items()}
        found.append(AttendedRows(streams[start], runs[start], seqs[start], rope=rope, **part))
    return found


def _stream(columns: dict[str, pa.Array], metadata: dict[bytes, str]) -> bytes:
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _table(data: bytes, max_bytes: int, columns: tuple[str, ...]) -> tuple[pa.Table, dict[bytes, bytes]]:
    if len(data) > max_bytes:
        raise TooLarge(f"{len(data):,} bytes; the limit is {max_bytes:,}: send fewer rows at once")
    try:
        check_arrow(data)
        with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
            table = reader.read_all().combine_chunks()
        table.validate(full=True)
        types = {"stream": pa.string(), "run": pa.string()}
        wrong = [name for name in columns if table.schema.field(name).type != types.get(name, pa.int64())]
        if wrong or any(table[name].null_count for name in table.schema.names):
            raise Corrupt(f"not an Arrow stream of attended rows: columns {wrong}, or one with gaps")
    except RaymemError:
        raise
    except (pa.ArrowException, ValueError, LookupError, TypeError, OSError, RuntimeError) as error:
        raise Corrupt(f"not an Arrow stream of attended rows: {type(error).__name__}: {str(error)[:200]}") from error
    return table, dict(table.schema.metadata or {})


def _tensors(table: pa.Table, metadata: dict[bytes, bytes]) -> dict[str, Tensor]:
    if _FORMAT not in metadata:
        return {}
    try:
        form = RowFormat(**json.loads(metadata[_FORMAT]))
        shapes = {name: (form.layers, form.heads, form.width)[: len(shape) - 1] for name, shape in _TENSORS.items()}
        found = {}
        for name in [name for name in _TENSORS if name in table.schema.names]:
            column = table[name].combine_chunks()
            if column.type.list_size != int(np.prod(shapes[name])):
                raise ValueError(f"{name} has lists of {column.type.list_size}, not of {shapes[name]}")
            flat = from_bits(np.array(column.flatten().to_numpy(zero_copy_only=False)))
            found[name] = flat.reshape(len(table), *shapes[name]).transpose(0, 1).contiguous()
        return found
    except (pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise Corrupt(f"not keys and values of rows: {type(error).__name__}: {str(error)[:200]}") from error


def _lists(tensor_LN: Tensor) -> pa.Array:
    """A tensor [L, N, …] as N fixed lists."""
    rows = tensor_LN.transpose(0, 1).contiguous()
    return pa.FixedSizeListArray.from_arrays(pa.array(to_bits(rows).reshape(-1)), rows[0].numel() if len(rows) else 1)


def _ints(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(np.array(table[name].to_numpy(), dtype=np.int64))
