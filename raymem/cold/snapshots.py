"""A bank's snapshots: the state of its encoder and mechanism at a journal position, as checksummed tensors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import structlog
import torch
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor

from raymem.cold.catalog import Entry
from raymem.cold.failures import reading, writing
from raymem.cold.tables import Tables, quote, snapshot_table
from raymem.errors import Corrupt
from raymem.prefetch import prefetch

# all of one width: LanceDB reads and writes these thrice as fast as binaries of any length, and doesn't compress them
_PART_BYTES = 4096
# parts that are written, and read, together
_BATCH_PARTS = 1024
_AHEAD = 4
# what one thread touches at a time, page by page
_TOUCH_BYTES, _PAGE_BYTES = 2**23, 4096
# a part's number; the manifest is the commit marker and has none
_MANIFEST = -1
_SCHEMA = pa.schema(
    [
        pa.field("snapshot", pa.string(), nullable=False),
        pa.field("pos", pa.int64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("data", pa.list_(pa.uint8(), _PART_BYTES), nullable=False),
        # of the marker alone
        pa.field("manifest", pa.large_binary()),
        pa.field("crc32c", pa.uint32()),
    ]
)
_log = structlog.get_logger(__name__)

Snapshot = tuple[int, dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class _Manifest:
    """What one snapshot holds: its tensors' bytes follow each other in the order of `tensors`."""

    snapshot: str
    pos: int
    tensors: dict[str, dict[str, Any]]
    meta: dict[str, Any]


class Snapshots:
    """The newest snapshots of one bank, and those at its tags.

    One without a manifest row was cut short and does not exist; the next `save`, or `clear`, deletes its parts.

    `fallbacks` counts how often `latest` had to pass over a corrupt one. `tagged` gives the positions to keep.
    """

    def __init__(
        self, tables: Tables, entry: Entry, keep: int = 2, tagged: Callable[[], Iterable[int]] = tuple
    ) -> None:
        self._tables = tables
        self._bank = entry.name
        self._name = snapshot_table(entry.id, entry.generation)
        self._sync = tables.folder_sync(self._name)
        self._keep = keep
        self._tagged = tagged
        self.fallbacks = 0

    def save(self, pos: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write the state at journal position `pos`, then drop all but the newest snapshots and those at tags.

        Args:
            pos: rows before this position are part of the state.
            tensors: of any dtype, shape and device.
            meta: plain JSON data.

        Raises:
            StorageError: nothing of it is visible.
        """
        snapshot = uuid.uuid4().hex
        headers = {name: _header(tensor) for name, tensor in tensors.items()}
        body = json.dumps({"tensors": headers, "meta": meta}, allow_nan=False).encode()
        with writing(f"save a snapshot of {self._bank}"):
            table = self._tables.create(self._name, _SCHEMA.empty_table())
            table.add(pa.RecordBatchReader.from_batches(_SCHEMA, _batches(snapshot, pos, tensors)))
            self._make_durable()
            table.add(pa.Table.from_batches([_marker(snapshot, pos, body)]))
            self._make_durable()
        self._prune()

    def latest(self, strict: bool = False, upto: int | None = None) -> Snapshot | None:
        """The newest snapshot, of those up to position `upto`, or None: its position, tensors of its own and meta.

        A corrupt one is passed over for the one before, because the journal can redo the rest, unless `strict`.

        Raises:
            Corrupt: `strict`, and the newest does not hold its checksums.
        """
        for row in self._manifests():
            if upto is not None and row["pos"] > upto:
                continue
            try:
                return self._load(self._parse(row))
            except Corrupt as error:
                if strict:
                    raise
                self.fallbacks += 1
                _log.warning("snapshot passed over", bank=self._bank, pos=row["pos"], reason=error.message)
        return None

    def nbytes(self) -> int:
        """Bytes of the newest snapshot's tensors; 0 if there is none."""
        rows = self._manifests()[:1]
        return sum(header["bytes"] for row in rows for header in self._parse(row).tensors.values())

    def unfinished(self) -> set[str]:
        """Snapshots that were cut short, or are being saved: they have parts and no manifest."""
        rows = self._select("true", ["snapshot", "part"])
        return {row["snapshot"] for row in rows} - {row["snapshot"] for row in rows if row["part"] == _MANIFEST}

    def clear(self) -> int:
        """Delete the parts of unfinished snapshots, when nobody is saving one; return how many snapshots that were."""
        return self._delete(self.unfinished())

    def _manifests(self) -> list[dict[str, Any]]:
        """Manifest rows, newest first."""
        rows = self._select(f"part = {_MANIFEST}", ["snapshot", "pos", "manifest", "crc32c"])
        # a stable sort: of two at one position, the one that was written later comes first
        return sorted(reversed(rows), key=lambda row: -row["pos"])

    def _select(self, where: str, columns: list[str]) -> list[dict[str, Any]]:
        try:
            table = self._tables.open(self._name)
        except Corrupt as error:
            if not error.details.get("missing"):
                raise
            # none was ever saved
            return []
        with reading(f"list the snapshots of {self._bank}"):
            found: list[dict[str, Any]] = table.search().where(where).select(columns).limit(None).to_list()
        return found

    def _parse(self, row: dict[str, Any]) -> _Manifest:
        if not row["manifest"] or crc32c(row["manifest"]) != row["crc32c"]:
            raise Corrupt(f"the manifest of {self._bank}'s snapshot at {row['pos']} does not match its checksum")
        return _Manifest(row["snapshot"], row["pos"], **json.loads(row["manifest"]))

    def _load(self, manifest: _Manifest) -> Snapshot:
        what = f"{self._bank}'s snapshot at position {manifest.pos}"
        # some are read while others are copied and checked
        stream = _Stream(what, prefetch(self._parts(manifest, what), _AHEAD))
        tensors = {name: _tensor(what, name, header, stream) for name, header in manifest.tensors.items()}
        stream.require_end()
        return manifest.pos, tensors, manifest.meta

    def _parts(self, manifest: _Manifest, what: str) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a snapshot's parts in order, some at a time."""
        where = f"snapshot = {quote(manifest.snapshot)} AND part >= 0"
        with reading(f"read {what}"):
            dataset = self._tables.open(self._name).to_lance()
            scanner = dataset.scanner(["part", "data"], where, batch_size=_BATCH_PARTS, late_materialization=False)
            batches = iter(scanner.to_batches())
        number = 0
        while True:
            with reading(f"read {what}"):
                batch = next(batches, None)
            if batch is None:
                return
            expected = np.arange(number, number + len(batch))
            if not np.array_equal(batch["part"].to_numpy(), expected):
                raise Corrupt(f"{what} has other parts than {number} to {number + len(batch) - 1} there")
            number += len(batch)
            yield bytes_of(batch["data"]).reshape(-1)

    def _prune(self) -> None:
        manifests = self._manifests()
        kept = {row["snapshot"] for row in manifests[: self._keep]}
        if len(kept) < len(manifests):
            # a tag's is the newest at its position
            at_tag = {row["pos"]: row["snapshot"] for row in reversed(manifests)}
            kept |= {at_tag[pos] for pos in self._tagged() if pos in at_tag}
        self._delete({row["snapshot"] for row in manifests} - kept | self.unfinished())

    def _delete(self, snapshots: set[str]) -> int:
        if snapshots:
            with writing(f"drop old snapshots of {self._bank}"):
                table = self._tables.open(self._name)
                table.delete(f"snapshot IN ({', '.join(map(quote, sorted(snapshots)))})")
                self._make_durable()
                table.to_lance().cleanup_old_versions(older_than=timedelta(0))
        return len(snapshots)

    def _make_durable(self) -> None:
        if self._sync:
            with writing(f"sync the snapshots of {self._bank}"):
                self._sync.sync()


def bytes_of(parts: pa.FixedSizeListArray) -> NDArray[np.uint8]:
    """The bytes [N, width] of N parts, not copied."""
    flat: NDArray[np.uint8] = parts.flatten().to_numpy()
    return flat.reshape(len(parts), parts.type.list_size)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _header(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "bytes": tensor.nbytes, "crc32c": _crc(tensor)}


def _crc(tensor: Tensor) -> int:
    data: Any = _bytes(tensor)
    return crc32c(data)


def _batches(snapshot: str, pos: int, tensors: dict[str, Tensor]) -> Iterator[pa.RecordBatch]:
    number = 0
    for piece in _pieces(tensors, _BATCH_PARTS * _PART_BYTES):
        parts = range(number, number + len(piece) // _PART_BYTES)
        yield _batch(snapshot, pos, parts, piece)
        number = parts.stop


def _pieces(tensors: dict[str, Tensor], size: int) -> Iterator[NDArray[np.uint8]]:
    """The bytes of all tensors, one after another, `size` at a time, and zeros where the last part is not full."""
    piece, filled = np.zeros(size, np.uint8), 0
    for tensor in tensors.values():
        data = _bytes(tensor)
        while len(data):
            taken, data = data[: size - filled], data[size - filled :]
            piece[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == size:
                yield piece
                piece, filled = np.zeros(size, np.uint8), 0
    if filled:
        yield piece[: -(-filled // _PART_BYTES) * _PART_BYTES]


def _marker(snapshot: str, pos: int, manifest: bytes) -> pa.RecordBatch:
    return _batch(snapshot, pos, range(_MANIFEST, 0), np.zeros(_PART_BYTES, np.uint8), manifest)


def _batch(
    snapshot: str, pos: int, parts: range, data: NDArray[np.uint8], manifest: bytes | None = None
) -> pa.RecordBatch:
    count, crc = len(parts), None if manifest is None else crc32c(manifest)
    columns = {"snapshot": [snapshot] * count, "pos": [pos] * count, "part": parts}
    columns |= {"manifest": [manifest] * count, "crc32c": [crc] * count}
    columns["data"] = pa.FixedSizeListArray.from_arrays(pa.array(data), _PART_BYTES)
    return pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)


class _Stream:
    """A snapshot's bytes in order, copied once: from where they were read to where they stay."""

    def __init__(self, what: str, parts: Iterator[NDArray[np.uint8]]) -> None:
        self._what = what
        self._parts = parts
        self._held = np.empty(0, np.uint8)
        self._given = 0

    def fill(self, target: NDArray[np.uint8], crc: int) -> int:
        """Fill all of `target` with the next bytes; return their checksum after those that have `crc`."""
        filled = 0
        while filled < len(target):
            if not len(self._held):
                self._held = self._next()
            piece = self._held[: len(target) - filled]
            copied: Any = target[filled : filled + len(piece)]
            copied[:] = piece
            # of the copy, while it is in the processor's cache
            crc = crc32c(copied, crc)
            filled, self._held = filled + len(piece), self._held[len(piece) :]
        self._given += filled
        return crc

    def require_end(self) -> None:
        """Refuse bytes that no tensor asked for, but those that fill the last part up."""
        if len(self._held) >= _PART_BYTES or next(self._parts, None) is not None:
            raise Corrupt(f"{self._what} holds more than the {self._given} bytes that its manifest says")

    def _next(self) -> NDArray[np.uint8]:
        part = next(self._parts, None)
        if part is None:
            raise Corrupt(f"{self._what} ends after {self._given} bytes, and its manifest says more")
        return part


def _touched(data: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """New memory, a piece at a time, whose pages are there.

    Where a virtual machine has to ask for them, the first use of pages takes four times as long as reading what goes
    into them: two threads do it, beside the reading.
    """
    pieces = [data[start : start + _TOUCH_BYTES] for start in range(0, len(data), _TOUCH_BYTES)]
    if len(pieces) < 2:
        yield from pieces
        return
    with ThreadPoolExecutor(2, thread_name_prefix="raymem-touch") as pool:
        for piece, touched in [(piece, pool.submit(_touch, piece)) for piece in pieces]:
            touched.result()
            yield piece


def _touch(piece: NDArray[np.uint8]) -> None:
    piece[::_PAGE_BYTES] = 0


def _tensor(what: str, name: str, header: dict[str, Any], stream: _Stream) -> Tensor:
    # rows find room behind it without a copy; memory that is never touched costs none
    data = np.empty(header["bytes"] + header["bytes"] // 8, np.uint8)
    tensor = torch.from_numpy(data)[: header["bytes"]]
    crc = 0
    for piece in _touched(data[: len(tensor)]):
        crc = stream.fill(piece, crc)
    if crc != header["crc32c"]:
        raise Corrupt(f"tensor {name!r} of {what} does not match its checksum", tensor=name)
    dtype: torch.dtype = getattr(torch, header["dtype"])
    # bytes that aren't there have no stride to be viewed by
    return tensor.view(dtype).reshape(header["shape"]) if len(tensor) else torch.zeros(header["shape"], dtype=dtype)
