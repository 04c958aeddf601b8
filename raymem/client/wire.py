"""Bytes between processes: msgpack with tensors in it, and Arrow for rows in bulk. Nothing is ever unpickled.

A tensor is msgpack extension 1: a little-endian uint16 with the length of a msgpack head `[dtype, shape]`, the head,
the elements in C order, little-endian. A raymem noun is a map of its fields with its name under the key `$`. Everything
else is plain msgpack: nil, booleans, integers, floats, strings, bytes, arrays (tuples become lists), maps of strings.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import msgpack
import pyarrow as pa
from pydantic import BaseModel
from torch import Tensor

from raymem.client.wire_limits import MOST_DEEP, check_arrow, check_msgpack, check_traces
from raymem.errors import Corrupt, InvalidInput, InvalidTrace, RaymemError, TooLarge
from raymem.inputs import TIME_END, shown
from raymem.rows import AttendedRows, JournalRows, Trace, is_journal
from raymem.tensors import TENSOR_DTYPES, dtype_name, from_bytes, is_dense, to_bytes
from raymem.types import (
    Ack,
    AttendQuery,
    BankInfo,
    BankSpec,
    Fingerprint,
    KeySpec,
    MemoryTokens,
    MigrationReport,
    Readout,
)

MAX_BYTES = 2**30

_TAG = "$"
_TENSOR = 1
_ERROR = "RaymemError"
# in the schema's metadata: the fingerprint of the rows, as JSON
_MADE_BY = b"raymem.fingerprint"
_NOUNS: dict[str, type[Any]] = {
    noun.__name__: noun
    for noun in (
        *(Ack, AttendedRows, AttendQuery, BankInfo, BankSpec, Fingerprint, KeySpec, MemoryTokens, MigrationReport),
        *(Readout, Trace),
    )
}
_FIELDS = {name: typing.get_type_hints(noun) for name, noun in _NOUNS.items()}
_PLAIN = (type(None), bool, int, float, str, bytes)


def pack(obj: Any, max_bytes: int = MAX_BYTES) -> bytes:
    """Write plain data, tensors and raymem's nouns as bytes.

    Args:
        obj: None, bool, int of 64 bits, float, str, bytes, list, tuple, dict with str keys, Tensor (any dtype but the
            quantised; gradients and device are lost), a noun, a RaymemError, nested up to 32 deep.
        max_bytes: most bytes of tensors and of the result.

    Raises:
        InvalidInput: anything else, numpy's scalars and arrays too.
        TooLarge: naming both sizes.
    """
    plain = _plain(obj, max_bytes, 0)
    try:
        data: bytes = msgpack.packb(plain, strict_types=True)
    except (OverflowError, ValueError) as error:
        raise InvalidInput(f"can't be sent: {error}; integers have 64 bits and text is UTF-8") from error
    _within(data, max_bytes)
    return data


def unpack(data: bytes | bytearray | memoryview, max_bytes: int = MAX_BYTES, max_items: int | None = None) -> Any:
    """Read what `pack` wrote; tensors are new, writable and on the CPU.

    `max_items` is for messages that are not trusted: the most items that are read, a map's keys counted.

    Raises:
        TooLarge: more bytes or items than allowed, naming the numbers.
        InvalidInput: msgpack that holds together, of an unknown noun, or with a field that can't be what it says.
        Corrupt: not msgpack, an unknown extension, a tensor that does not hold what it says.
    """
    _within(data, max_bytes)
    if max_items is not None:
        check_msgpack(memoryview(data), max_items)
    try:
        return msgpack.unpackb(
            data,
            ext_hook=_from_extension,
            object_hook=_from_map,
            strict_map_key=True,
            # raymem sends no timestamps: one is read as a float
            timestamp=1,
        )
    except RaymemError:
        raise
    except (ValueError, OverflowError, TypeError) as error:
        raise Corrupt(f"not a raymem message: {type(error).__name__}: {str(error)[:200]}") from error


def traces_to_arrow(traces: Sequence[Trace]) -> bytes:
    """Traces of one bank as an Arrow IPC stream in the journal's layout, checksums included; for bulk writes.

    Raises:
        InvalidInput: no trace, or traces of different models, layers, width or dtype.
    """
    if not traces:
        raise InvalidInput("no trace to send: give at least one")
    tables = [JournalRows.of(trace, 0, 0).to_arrow() for trace in traces]
    if any(table.schema != tables[0].schema for table in tables):
        raise InvalidInput("traces of different layers, widths or dtypes can't travel together: send them one by one")
    made = traces[0].fingerprint
    if any(trace.fingerprint != made for trace in traces):
        raise InvalidInput("traces that different models made can't travel together: send them one by one")
    own = {} if made is None else {_MADE_BY: made.model_dump_json().encode()}
    metadata = {**(tables[0].schema.metadata or {}), **own}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, tables[0].schema.with_metadata(metadata)) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(metadata))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def traces_from_arrow(data: bytes | bytearray | memoryview, max_bytes: int = MAX_BYTES) -> list[Trace]:
    """Read what `traces_to_arrow` wrote, each row checked against its checksum.

    A trace ends where the run or the time changes or seq jumps; neighbours that follow each other come as one.

    Raises:
        TooLarge: more bytes, batches, rows or traces than allowed, naming the limit.
        Corrupt: not such a stream, a compressed one, or a row that does not match its checksum.
        InvalidTrace: a row of a time that no row can have.
    """
    _within(data, max_bytes)
    try:
        check_arrow(data)
        with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
            if not is_journal(reader.schema):
                raise Corrupt(f"not an Arrow stream of rows: its columns are {str(reader.schema)[:200]!r}")
            table = reader.read_all()
        table.validate(full=True)
        _require_times(table)
        check_traces(table)
        said = (table.schema.metadata or {}).get(_MADE_BY)
        made = None if said is None else Fingerprint.model_validate_json(said)
        found = [trace for piece in JournalRows.from_arrow(table) for trace in piece.verify().traces()]
        return [replace(trace, fingerprint=made) for trace in found]
    except RaymemError:
        raise
    except (pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise Corrupt(f"not an Arrow stream of rows: {type(error).__name__}: {str(error)[:200]}") from error


def _require_times(table: pa.Table) -> None:
    # what is read from a store's own tables is mended, and what comes in is refused
    for time in set(table["time"].to_pylist()):
        if time is None or not 0 <= time < TIME_END:
            raise InvalidTrace(f"time is {time}; give seconds since the epoch, from 0 to before {TIME_END}")


def _within(data: Any, max_bytes: int) -> None:
    size = memoryview(data).nbytes
    if size > max_bytes:
        raise TooLarge(f"{size:,} bytes; the limit is {max_bytes:,}: send less at once", size=size, limit=max_bytes)


def _plain(obj: Any, room: int, depth: int) -> Any:
    """`obj` as what msgpack knows by itself; `room` is the most bytes one tensor may have."""
    if type(obj) in _PLAIN:
        return obj
    if depth == MOST_DEEP:
        raise InvalidInput(f"nested more than {MOST_DEEP} deep: flatten it before sending")
    if isinstance(obj, Tensor):
        return _from_tensor(obj, room)
    if isinstance(obj, RaymemError):
        # details are for people and JSON: what JSON doesn't know goes as text
        return {_TAG: _ERROR} | json.loads(json.dumps(obj.to_wire(), default=str))
    if type(obj).__name__ in _NOUNS and type(obj) is _NOUNS[type(obj).__name__]:
        named = (
            obj.model_dump()
            if isinstance(obj, BaseModel)
            else {item.name: getattr(obj, item.name) for item in fields(obj)}
        )
        return {_TAG: type(obj).__name__} | {name: _plain(value, room, depth + 1) for name, value in named.items()}
    if type(obj) is dict:
        return {_key(key): _plain(value, room, depth + 1) for key, value in obj.items()}
    if type(obj) is list or isinstance(obj, tuple):
        return [_plain(value, room, depth + 1) for value in obj]
    kind = f"{type(obj).__module__}.{type(obj).__name__}"
    raise InvalidInput(f"a {kind} can't be sent: convert numpy scalars with .item() and arrays with torch.from_numpy")


def _key(key: Any) -> str:
    if type(key) is not str or key == _TAG:
        raise InvalidInput(f"map key {key!r} can't be sent: keys are strings other than {_TAG!r}")
    return key


def _from_tensor(tensor: Tensor, room: int) -> msgpack.ExtType:
    name = dtype_name(tensor.dtype)
    if not is_dense(tensor) or name not in TENSOR_DTYPES:
        raise InvalidInput(f"a {tensor.layout} tensor of {tensor.dtype} can't be sent: make it dense and dequantised")
    if tensor.nbytes > room:
        raise TooLarge(
            f"a tensor of {tensor.nbytes:,} bytes; the limit is {room:,}: send less at once",
            size=tensor.nbytes,
            limit=room,
        )
    head = msgpack.packb([name, list(tensor.shape)])
    return msgpack.ExtType(_TENSOR, b"".join([len(head).to_bytes(2, "little"), head, to_bytes(tensor).data]))


def _from_extension(code: int, data: bytes) -> Tensor:
    if code != _TENSOR:
        raise Corrupt(f"message extension {code} is unknown; raymem sends {_TENSOR} alone")
    start = 2 + int.from_bytes(data[:2], "little")
    head = msgpack.unpackb(data[2:start])
    if not isinstance(head, list) or len(head) != 2:
        raise Corrupt(f"a tensor's head is {str(head)[:80]}; expected [dtype, shape]")
    return from_bytes(bytearray(memoryview(data)[start:]), *head)


def _from_map(found: dict[Any, Any]) -> Any:
    if not all(type(key) is str for key in found):
        raise InvalidInput(f"a map has the key {next(key for key in found if type(key) is not str)!r:.80}; give text")
    name = found.pop(_TAG, None)
    if name is None:
        return found
    if name != _ERROR and not (isinstance(name, str) and name in _NOUNS):
        raise InvalidInput(f"a message's noun is {shown(name)}; this raymem knows {sorted(_NOUNS)}")
    try:
        return RaymemError.from_wire(found) if name == _ERROR else _noun(_NOUNS[name], found)
    except RaymemError:
        raise
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{name} in a message: {type(error).__name__}: {str(error)[:200]}") from error


def _noun(noun: type[Any], found: dict[str, Any]) -> Any:
    if issubclass(noun, BaseModel):
        return noun.model_validate(found)
    hints = _FIELDS[noun.__name__]
    unknown = sorted(set(found) - set(hints))
    if unknown:
        raise InvalidInput(f"{noun.__name__} has no field {shown(unknown[0])}; it has {sorted(hints)}")
    return noun(**{name: _fit(value, hints[name], f"{noun.__name__}.{name}") for name, value in found.items()})


def _fit(value: Any, hint: Any, where: str) -> Any:
    """`value` as a field of this type; lists become the tuples that they were."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is float and type(value) is int:
        return float(value)
    if origin is types.UnionType:
        return None if value is None else _fit(value, inner[0], where)
    if origin is typing.Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) == len(value):
            return tuple(_fit(part, kind, where) for part, kind in zip(value, kinds, strict=True))
    if origin is dict and type(value) is dict:
        return {key: _fit(part, inner[1], where) for key, part in value.items()}
    if isinstance(hint, type) and (type(value) is hint or (hint is Tensor and isinstance(value, Tensor))):
        return value
    raise InvalidInput(f"{where} is {shown(value)}; give {getattr(hint, '__name__', hint)}")
