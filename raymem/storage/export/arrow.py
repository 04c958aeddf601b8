"""Arrow from elsewhere: read batch by batch, each looked at before a byte of it is unfolded or trusted."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from raymem.errors import Corrupt

# in Arrow's Message.fbs: fields of a message, and of a record batch
_HEADER, _COMPRESSION = 2, 3


def batches(source: Any, schema: pa.Schema | None = None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the batches of an Arrow IPC stream, in order; each is whole and sound.

    Nothing grows: a batch that is compressed or has a dictionary is refused before it is unpacked, and offsets, UTF-8
    and null counts are checked before they are followed.

    Args:
        source: a buffer or a file that is read from where it stands.
        schema: what the stream's must be, its metadata apart; any by default.

    Raises:
        Corrupt: it is no such stream. Batches raise it too.
    """
    reader = pa.ipc.MessageReader.open_stream(source)
    found = _damage(lambda: pa.ipc.read_schema(_next(reader, "schema")))
    if schema is not None and not found.equals(schema):
        raise Corrupt(f"its schema is {_short(found)} where {_short(schema)} belongs")
    return found, _batches(reader, found)


def _batches(reader: pa.ipc.MessageReader, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            message = _damage(reader.read_next_message)
        except StopIteration:
            return
        yield _damage(lambda message=message: _batch(message, schema))


def _batch(message: pa.ipc.Message, schema: pa.Schema) -> pa.RecordBatch:
    if message.type != "record batch":
        raise Corrupt(f"it has a {message.type} among its record batches")
    if is_compressed(message.metadata.to_pybytes()):
        raise Corrupt("it is compressed, which no such file is")
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    return batch


def is_compressed(metadata: bytes) -> bool:
    """Whether the record batch that this message is about says that its buffers are compressed."""
    (root,) = struct.unpack_from("<I", metadata)
    header = _field(metadata, root, _HEADER)
    if header is None:
        raise Corrupt("a message has no header")
    (offset,) = struct.unpack_from("<I", metadata, header)
    return _field(metadata, header + offset, _COMPRESSION) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table lies, if it has one."""
    (back,) = struct.unpack_from("<i", data, table)
    (size,) = struct.unpack_from("<H", data, table - back)
    at = 4 + 2 * number
    if at + 2 > size:
        return None
    (offset,) = struct.unpack_from("<H", data, table - back + at)
    return table + offset if offset else None


def _next(reader: pa.ipc.MessageReader, kind: str) -> pa.ipc.Message:
    try:
        message = reader.read_next_message()
    except StopIteration:
        raise Corrupt("it is empty") from None
    if message.type != kind:
        raise Corrupt(f"it begins with a {message.type}, not with a {kind}")
    return message


def _damage(read: Any) -> Any:
    try:
        return read()
    # what pyarrow makes of bytes that are no Arrow; out of memory is told as one of its own
    except (pa.ArrowException, ValueError, LookupError, TypeError, OSError, struct.error, OverflowError) as error:
        raise Corrupt(f"it can't be read ({type(error).__name__}: {str(error)[:200]})") from error


def _short(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:400]
