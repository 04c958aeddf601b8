"""What a message would unfold to, told from its outline before anything is made of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from raymem.errors import Corrupt, TooLarge

MOST_DEEP = 32
# rows come a thousand at a time, or one a batch
MOST_BATCHES = 2**16
MOST_ROWS = 2**20
# each is written by itself
MOST_TRACES = 2**14
# the columns and the fingerprint of the rows; a model of a hundred layers has 4 KiB of them
_SCHEMA_BYTES = 2**16

# where a message's and a record batch's flatbuffers have the fields that matter
_HEADER = 2
_LENGTH, _COMPRESSION = 0, 3


class _Kind(NamedTuple):
    """One of msgpack's types: bytes that say how much follows, fixed bytes that follow, and items that each is."""

    count_bytes: int = 0
    payload: int = 0
    items: int = 0


def _kinds() -> dict[int, _Kind]:
    kinds = dict.fromkeys((*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3), _Kind())
    for first, payload in zip((0xCA, 0xCB, *range(0xCC, 0xD4)), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True):
        kinds[first] = _Kind(payload=payload)
    kinds |= {0xD4 + power: _Kind(payload=1 + 2**power) for power in range(5)}
    for power in range(3):
        kinds[0xC4 + power] = kinds[0xD9 + power] = _Kind(2**power)
        # an extension has its code between its length and its bytes
        kinds[0xC7 + power] = _Kind(2**power, payload=1)
    for power in (1, 2):
        kinds[0xDB + power] = _Kind(2**power, items=1)
        kinds[0xDD + power] = _Kind(2**power, items=2)
    return kinds


_KINDS = _kinds()


def check_msgpack(data: memoryview, most_items: int) -> None:
    """Walk over a message, skipping what is in strings, bytes and extensions.

    Raises:
        TooLarge: more items than allowed.
        Corrupt: it ends early, is nested too deep, or has bytes that msgpack doesn't know.
    """
    at, items, left = 0, 0, [1]
    while left:
        if not left[-1]:
            left.pop()
            continue
        left[-1] -= 1
        items += 1
        if items > most_items or sum(left) > most_items:
            raise TooLarge(f"a message of more than {most_items} items is not read here: send tensors, not lists")
        if at >= len(data):
            raise Corrupt("not a raymem message: it ends early")
        at, children = _step(data, at)
        if children:
            left.append(children)
        if len(left) > MOST_DEEP + 1:
            raise Corrupt(f"not a raymem message: nested more than {MOST_DEEP} deep")
    if at != len(data):
        raise Corrupt(f"not a raymem message: it has {len(data)} bytes and ends after {at}")


def _step(data: memoryview, at: int) -> tuple[int, int]:
    """Where the item at a place ends, its children not counted, and how many of those there are."""
    first = data[at]
    if 0x80 <= first <= 0x9F:
        return at + 1, (first & 0x0F) * (2 if first < 0x90 else 1)
    if 0xA0 <= first <= 0xBF:
        return at + 1 + (first & 0x1F), 0
    kind = _KINDS.get(first)
    if kind is None:
        raise Corrupt(f"not a raymem message: byte {first:#x} is no type of msgpack")
    start = at + 1 + kind.count_bytes
    count = int.from_bytes(data[at + 1 : start], "big")
    return start + kind.payload + (0 if kind.items else count), kind.items * count


def check_arrow(data: Any) -> None:
    """Look at an IPC stream's messages: a schema, then batches as large as they are sent, none compressed.

    Raises:
        Corrupt: another message, a dictionary, a compressed batch, or an outline that leads out of its message.
        TooLarge: more batches or rows than allowed, or a schema that is none of rows.
    """
    rows = batches = 0
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(data)):
        batches += 1
        if batches == 1:
            _expect(message, "schema")
            _within_schema(message.metadata.size)
            continue
        _expect(message, "record batch")
        length, compressed = _batch(message.metadata.to_pybytes())
        if compressed:
            raise Corrupt("a compressed Arrow stream is not read here: write it without compression")
        rows += length
        if rows > MOST_ROWS or batches > MOST_BATCHES:
            raise TooLarge(f"an Arrow stream has {MOST_ROWS} rows in {MOST_BATCHES} batches at most; send several")


def check_traces(table: pa.Table) -> None:
    """Count the traces that rows would be, before any is made.

    Raises:
        TooLarge: more than allowed.
    """
    first, then = table.slice(0, max(0, len(table) - 1)), table.slice(1)
    cuts = pc.not_equal(then["seq"], pc.add(first["seq"], 1))
    widths = pc.fill_null(pc.list_value_length(table["value"]), -1)
    columns = [(first[name], then[name]) for name in ("epoch", "stream", "run", "time")]
    for before, after in (*columns, (widths.slice(0, len(first)), widths.slice(1))):
        # a null equals nothing here
        cuts = pc.or_(cuts, pc.fill_null(pc.not_equal(before, after), True))
    if (pc.sum(cuts).as_py() or 0) >= MOST_TRACES:
        raise TooLarge(f"an Arrow stream has {MOST_TRACES} traces at most; send several, or longer traces")


def _within_schema(size: int) -> None:
    if size > _SCHEMA_BYTES:
        raise TooLarge(f"an Arrow stream's schema has {size} bytes; that of rows has {_SCHEMA_BYTES} at most")


def _expect(message: pa.ipc.Message, kind: str) -> None:
    if message.type != kind:
        raise Corrupt(f"an Arrow stream of rows has no {message.type} where a {kind} belongs")


def _batch(metadata: bytes) -> tuple[int, bool]:
    """The rows that a batch says it has, and whether its buffers are compressed."""
    root = _unsigned(metadata, 0, 4)
    place = _field(metadata, root, _HEADER)
    batch = place + _unsigned(metadata, place, 4)
    length = _field(metadata, batch, _LENGTH)
    rows = _unsigned(metadata, length, 8) if length else 0
    return rows, bool(_field(metadata, batch, _COMPRESSION))


def _field(data: bytes, table: int, number: int) -> int:
    """Where a table's field is, 0 if it has none."""
    offset = int.from_bytes(data[table : table + 4], "little", signed=True)
    vtable = table - offset
    if 4 + 2 * number >= _unsigned(data, vtable, 2):
        return 0
    place = _unsigned(data, vtable + 4 + 2 * number, 2)
    return table + place if place else 0


def _unsigned(data: bytes, at: int, size: int) -> int:
    if not 0 <= at <= len(data) - size:
        raise Corrupt("an Arrow message's outline leads out of it")
    return int.from_bytes(data[at : at + size], "little")
