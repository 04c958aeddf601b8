"""A bank's snapshots: the state of its encoder and mechanism at a journal position, as checksummed tensors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor

from raymem.errors import Corrupt, StorageError
from raymem.logs import get_logger
from raymem.storage.catalog import Entry
from raymem.storage.tables.blobs import BLOB, FILE_FORMAT, Blob, opened
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables, quote, snapshot_table

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
        pa.field("data", pa.large_binary(), metadata=BLOB),
        # of the marker alone
        pa.field("manifest", pa.large_binary()),
        # of the data, or of the manifest
        pa.field("crc32c", pa.uint32()),
    ]
)
_log = get_logger("raymem.snapshots")

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
        self._is_merged = MERGED_TAG in entry.tags
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
            table = self._create()
            table.add(pa.RecordBatchReader.from_batches(_SCHEMA, _parts(snapshot, pos, tensors)))
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
        rows = self._select("true", ["snapshot", "start"])
        return {row["snapshot"] for row in rows} - {row["snapshot"] for row in rows if row["start"] == _MANIFEST}

    def clear(self) -> int:
        """Delete the parts of unfinished snapshots, when nobody is saving one; return how many snapshots that were."""
        return self._delete(self.unfinished())

    def _manifests(self) -> list[dict[str, Any]]:
        """Manifest rows, newest first."""
        rows = self._select(f"start = {_MANIFEST}", ["snapshot", "pos", "manifest", "crc32c"])
        # a stable sort: of two at one position, the one that was written later comes first
        return sorted(reversed(rows), key=lambda row: -row["pos"])

    def _select(self, where: str, columns: list[str]) -> list[dict[str, Any]]:
        table = self._open()
        if table is None:
            return []
        if not _is_ours(table):
            if self._is_merged:
                raise Corrupt(
                    f"an earlier build wrote {self._bank}'s snapshots, and only they hold the state it was merged to; "
                    "export it with that one and import it here, or merge again"
                )
            _log.warning("snapshots of an earlier build passed over: the journal redoes them", bank=self._bank)
            return []
        with reading(f"list the snapshots of {self._bank}"):
            found: list[dict[str, Any]] = table.search().where(where).select(columns).limit(None).to_list()
        return found

    def _open(self) -> Any | None:
        """The table, or None if no snapshot was ever saved."""
        try:
            return self._tables.open(self._name)
        except Corrupt as error:
            if not error.details.get("missing"):
                raise
            return None

    def _create(self) -> Any:
        try:
            return self._tables.create(self._name, _SCHEMA.empty_table(), FILE_FORMAT)
        except StorageError:
            there = self._open()
            if there is None or _is_ours(there):
                raise
        self._tables.drop(self._name)
        return self._tables.create(self._name, _SCHEMA.empty_table(), FILE_FORMAT)

    def _parse(self, row: dict[str, Any]) -> _Manifest:
        if not row["manifest"] or crc32c(row["manifest"]) != row["crc32c"]:
            raise Corrupt(f"the manifest of {self._bank}'s snapshot at {row['pos']} does not match its checksum")
        return _Manifest(row["snapshot"], row["pos"], **json.loads(row["manifest"]))

    def _load(self, manifest: _Manifest) -> Snapshot:
        what = f"{self._bank}'s snapshot at position {manifest.pos}"
        state = _State(manifest.tensors)
        where = f"snapshot = {quote(manifest.snapshot)} AND start > {_MANIFEST}"
        with reading(f"read {what}"), opened(self._tables, self._name, "data", where, ["start", "crc32c"]) as parts:
            parts.sort(key=lambda part: part[0]["start"])
            ends = accumulate(blob.size for _, blob in parts)
            if [0, *ends] != [*(row["start"] for row, _ in parts), state.nbytes]:
                raise Corrupt(f"{what} lacks some of the {state.nbytes} bytes that its manifest names, or has others")
            with ThreadPoolExecutor(_READERS, thread_name_prefix="raymem-snapshot") as pool:
                # raises what a part did
                list(pool.map(lambda part: _fill(what, state, *part), parts))
        return manifest.pos, state.tensors(), manifest.meta

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


def _is_ours(table: Any) -> bool:
    return set(_SCHEMA.names) == set(table.schema.names)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _crc(views: Iterable[NDArray[np.uint8]]) -> int:
    crc: int = 0
    for view in views:
        crc = crc32c(view.data, crc)
    return crc


def _header(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "bytes": tensor.nbytes}


def _parts(snapshot: str, pos: int, tensors: dict[str, Tensor]) -> Iterator[pa.RecordBatch]:
    start = 0
    for piece in _pieces(tensors, _PART_BYTES):
        offsets = pa.py_buffer(np.array([0, len(piece)], np.int64))
        # not copied
        data = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(piece)])
        yield _row(snapshot, pos, start, _crc([piece]), data=data)
        start += len(piece)


def _pieces(tensors: dict[str, Tensor], size: int) -> Iterator[NDArray[np.uint8]]:
    """The bytes of all tensors, one after another, `size` at a time."""
    piece, filled = np.empty(size, np.uint8), 0
    for tensor in tensors.values():
        data = _bytes(tensor)
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


class _State:
    """Memory for a snapshot's tensors, and the bytes of all of them as if one came after the other."""

    def __init__(self, headers: dict[str, dict[str, Any]]) -> None:
        self._headers = headers
        sizes = [header["bytes"] for header in headers.values()]
        # rows find room behind it without a copy; memory that is never touched costs none
        self._data = [np.empty(size + size // 8, np.uint8) for size in sizes]
        self._ends: list[int] = list(accumulate(sizes, initial=0))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self._ends[-1]

    def views(self, start: int, size: int) -> list[NDArray[np.uint8]]:
        """Where `size` bytes from `start` on belong, tensor by tensor."""
        stop, found = start + size, []
        for data, (begins, ends) in zip(self._data, pairwise(self._ends), strict=True):
            if max(start, begins) < min(stop, ends):
                found.append(data[max(start, begins) - begins : min(stop, ends) - begins])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """By name, in the order of the manifest."""
        return {
            name: _tensor(data, header) for data, (name, header) in zip(self._data, self._headers.items(), strict=True)
        }


def _tensor(data: NDArray[np.uint8], header: dict[str, Any]) -> Tensor:
    dtype: torch.dtype = getattr(torch, header["dtype"])
    # bytes that aren't there have no stride to be viewed by
    if not header["bytes"]:
        return torch.zeros(header["shape"], dtype=dtype)
    return torch.from_numpy(data)[: header["bytes"]].view(dtype).reshape(header["shape"])


def _fill(what: str, state: _State, row: dict[str, Any], blob: Blob) -> None:
    views = state.views(row["start"], blob.size)
    blob.read_into(views)
    if _crc(views) != row["crc32c"]:
        raise Corrupt(f"{what} does not match its checksum from byte {row['start']} on", start=row["start"])
