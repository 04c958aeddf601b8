"""A bank's snapshots: the state of its encoder and mechanism at a journal position, as checksummed tensors."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor

from raymem.errors import Corrupt
from raymem.logs import get_logger
from raymem.storage.catalog import Entry
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables, quote, snapshot_table
from raymem.tensors import dtype_name, from_bytes, to_bytes

# what a column's field says, and the version of Lance's files that keeps its values beside the other columns: later
# ones keep them in a folder for each commit, which no clean-up removes
_BLOB = {"lance-encoding:blob": "true"}
_FILE_FORMAT = "2.1"
# an address is a fragment's number and a row's in it
_ROW_BITS = 32
# what one thread reads at a time
_PART_BYTES = 2**22
# four do on two cores; an object store is to have more requests to answer at once
_READERS = 16
# names the position whose state was merged and not replayed, so that it is kept
MERGED_TAG = "merged"
# where a part begins; the manifest is the commit marker and has no bytes of the state
_MANIFEST = -1
_SCHEMA = pa.schema(
    [
        pa.field("snapshot", pa.string(), nullable=False),
        pa.field("pos", pa.int64(), nullable=False),
        # of the state's bytes
        pa.field("start", pa.int64(), nullable=False),
        # neither compressed nor taken apart
        pa.field("data", pa.large_binary(), metadata=_BLOB),
        # of the marker alone
        pa.field("manifest", pa.large_binary()),
        # of the data, or of the manifest
        pa.field("crc32c", pa.uint32()),
    ]
)
_log = get_logger("raymem.snapshots")

Snapshot = tuple[int, dict[str, Tensor], dict[str, Any]]
_Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _StoredBytes:
    """One part of a state: where in it these bytes begin, how many they are, their checksum, and where they are kept.

    That is a place in an open file, or what LanceDB makes of it in an object store.
    """

    start: int
    size: int
    crc: int
    place: tuple[int, int] | Any


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
            table = self._tables.create(self._name, _SCHEMA.empty_table(), _FILE_FORMAT)
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
                return self._load(row)
            except Corrupt as error:
                if strict:
                    raise
                self.fallbacks += 1
                _log.warning("snapshot passed over", bank=self._bank, pos=row["pos"], reason=error.message)
        return None

    def nbytes(self) -> int:
        """Bytes of the newest snapshot's tensors; 0 if there is none."""
        rows = self._manifests()[:1]
        return sum(header["bytes"] for row in rows for header in self._manifest(row)["tensors"].values())

    def unfinished(self) -> set[str]:
        """Snapshots that were cut short, or are being saved: they have parts and no manifest."""
        rows = self._select("true", ["snapshot", "start"])
        return {row["snapshot"] for row in rows} - {row["snapshot"] for row in rows if row["start"] == _MANIFEST}

    def clear(self) -> int:
        """Delete the parts of unfinished snapshots, while none is being saved; return how many snapshots that were."""
        return self._delete(self.unfinished())

    def _manifests(self) -> list[dict[str, Any]]:
        """Manifest rows, newest first."""
        rows = self._select(f"start = {_MANIFEST}", ["snapshot", "pos", "manifest", "crc32c"])
        # a stable sort: of two at one position, the one that was written later comes first
        return sorted(reversed(rows), key=itemgetter("pos"), reverse=True)

    def _select(self, where: str, columns: list[str]) -> list[dict[str, Any]]:
        try:
            table = self._tables.open(self._name)
        except Corrupt as error:
            if not error.details.get("missing"):
                raise
            # no snapshot was ever saved
            return []
        with reading(f"list the snapshots of {self._bank}"):
            found: list[dict[str, Any]] = table.search().where(where).select(columns).limit(None).to_list()
        return found

    def _manifest(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a manifest row says: "tensors", whose bytes follow each other in this order, and "meta"."""
        if not row["manifest"] or crc32c(row["manifest"]) != row["crc32c"]:
            raise Corrupt(f"the manifest of {self._bank}'s snapshot at {row['pos']} does not match its checksum")
        parsed: dict[str, Any] = json.loads(row["manifest"])
        return parsed

    def _load(self, row: dict[str, Any]) -> Snapshot:
        """Read a state's parts to where they stay, in several threads."""
        manifest = self._manifest(row)
        headers: dict[str, dict[str, Any]] = manifest["tensors"]
        what = f"{self._bank}'s snapshot at position {row['pos']}"
        sizes = [header["bytes"] for header in headers.values()]
        ends = list(accumulate(sizes, initial=0))
        # rows find room behind a tensor without a copy; memory that is never touched costs none
        data = [np.empty(size + size // 8, np.uint8) for size in sizes]

        def fill(part: _StoredBytes) -> None:
            stop = part.start + part.size
            # where the part's bytes belong, tensor by tensor
            views = [
                each[max(part.start, begin) - begin : min(stop, end) - begin]
                for each, (begin, end) in zip(data, pairwise(ends), strict=True)
                if max(part.start, begin) < min(stop, end)
            ]
            _read(part.place, views)
            if _crc(views) != part.crc:
                raise Corrupt(f"{what} does not match its checksum from byte {part.start} on", start=part.start)

        with reading(f"read {what}"), self._parts(row["snapshot"]) as parts:
            if [0, *accumulate(part.size for part in parts)] != [*(part.start for part in parts), ends[-1]]:
                raise Corrupt(f"{what} lacks some of the {ends[-1]} bytes that its manifest names, or has others")
            with ThreadPoolExecutor(_READERS, thread_name_prefix="raymem-snapshot") as pool:
                # raises what a part did
                list(pool.map(fill, parts))
        tensors = {
            name: from_bytes(torch.from_numpy(each)[: header["bytes"]], header["dtype"], header["shape"])
            for each, (name, header) in zip(data, headers.items(), strict=True)
        }
        return row["pos"], tensors, manifest["meta"]

    @contextmanager
    def _parts(self, snapshot: str) -> Iterator[list[_StoredBytes]]:
        """The parts of a state in order, to be read inside.

        In a folder that is done without LanceDB, whose own two copies take twice as long as the reading (ADR-9). What
        is open stays readable when another process drops it meanwhile.
        """
        dataset = self._tables.open(self._name).to_lance()
        where = f"snapshot = {quote(snapshot)} AND start > {_MANIFEST}"
        scanner = dataset.scanner(
            ["start", "crc32c", "data"], where, with_row_address=True, blob_handling="blobs_descriptions"
        )
        rows = scanner.to_table().sort_by("start").to_pylist()
        addresses = [row["_rowaddr"] for row in rows]
        folder = self._tables.folder(self._name)
        places: list[Any]
        with ExitStack() as files:
            if folder is None:
                # none at all is refused
                places = dataset.take_blobs("data", addresses=addresses) if rows else []
                sizes = [file.size() for file in places]
            else:
                handles: dict[int, int] = {}
                for number in {address >> _ROW_BITS for address in addresses}:
                    path = folder / "data" / dataset.get_fragment(number).data_files()[0].path
                    handles[number] = files.enter_context(path.open("rb")).fileno()
                places = [(handles[row["_rowaddr"] >> _ROW_BITS], row["data"]["position"]) for row in rows]
                sizes = [row["data"]["size"] for row in rows]
            yield [
                _StoredBytes(row["start"], size, row["crc32c"], place)
                for row, size, place in zip(rows, sizes, places, strict=True)
            ]

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


def _crc(views: Iterable[_Bytes]) -> int:
    crc: int = 0
    for view in views:
        crc = crc32c(view.data, crc)
    return crc


def _header(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "bytes": tensor.nbytes}


def _batches(snapshot: str, pos: int, tensors: dict[str, Tensor]) -> Iterator[pa.RecordBatch]:
    start = 0
    for piece in _pieces(tensors, _PART_BYTES):
        offsets = pa.py_buffer(np.array([0, len(piece)], np.int64))
        # not copied
        data = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(piece)])
        yield _row(snapshot, pos, start, _crc([piece]), data=data)
        start += len(piece)


def _pieces(tensors: dict[str, Tensor], size: int) -> Iterator[_Bytes]:
    """The bytes of all tensors, one after another, `size` at a time."""
    piece, filled = np.empty(size, np.uint8), 0
    for tensor in tensors.values():
        data = to_bytes(tensor)
        while len(data):
            taken, data = data[: size - filled], data[size - filled :]
            piece[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == size:
                yield piece
                piece, filled = np.empty(size, np.uint8), 0
    if filled:
        yield piece[:filled]


def _marker(snapshot: str, pos: int, manifest: bytes) -> pa.RecordBatch:
    return _row(snapshot, pos, _MANIFEST, crc32c(manifest), manifest=[manifest])


def _row(snapshot: str, pos: int, start: int, crc: int, **content: Any) -> pa.RecordBatch:
    columns = {"snapshot": [snapshot], "pos": [pos], "start": [start], "crc32c": [crc]}
    return pa.RecordBatch.from_pydict(columns | {"data": [None], "manifest": [None]} | content, schema=_SCHEMA)


def _read(place: tuple[int, int] | Any, views: Sequence[_Bytes]) -> None:
    """Fill arrays one after another; of bytes that were cut short the rest stays as it is."""
    if isinstance(place, tuple):
        handle, position = place
        for view in views:
            rest = view.data
            while len(rest) and (count := os.preadv(handle, [rest], position)):
                rest, position = rest[count:], position + count
        return
    data = np.frombuffer(place.readall(), np.uint8)
    for view in views:
        view[:], data = data[: len(view)], data[len(view) :]
