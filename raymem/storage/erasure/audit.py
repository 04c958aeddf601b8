"""Looking for erased rows in the files that are left: every one is decoded, whatever version it belongs to.

Columns are encoded on disk, so that searching the bytes for a name or a token would find nothing even when it is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.encode.saved_state import named_runs, position_tensors, positions
from raymem.errors import Corrupt
from raymem.inputs import TIME_END, composed
from raymem.storage.attended import named_rows
from raymem.storage.erasure.reach import Reach
from raymem.storage.journal.tombstones import Tombstones
from raymem.storage.spellings import same
from raymem.storage.tables.files import File, Files
from raymem.types import FileCheck, Selection

_SAMPLE = 1024
# of keys and values in a file, decoded at a time
_PIECES = 16
_DIGEST_BYTES = 16
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ErasedRows:
    """How a row that was erased would be known, without keeping what was erased.

    `gone` are its positions, which no later row of the bank gets, `contents` digests of token and hidden states of up
    to 1,024 of the rows, but those that a row which stays has too: `same` counts such rows. `reach` is what was left
    near the rows when they were looked for; it isn't kept.
    """

    bank_id: str
    what: Selection
    generation: int
    gone: Tombstones
    contents: frozenset[bytes] = frozenset()
    reach: Reach = field(default_factory=Reach)
    same: int = 0

    def of(self, batch: pa.RecordBatch) -> Mask:
        """Which rows of a journal or a log are, or hold what was in, a row that was erased."""
        found_T = self.named(batch)
        if "bank" in batch.schema.names:
            found_T &= _true(pc.equal(batch["bank"], self.bank_id))
            rest_T = ~found_T & _true(pc.equal(batch["bank"], self.bank_id))
        else:
            rest_T = ~found_T
        if self.contents:
            digests = contents(batch, np.flatnonzero(rest_T).tolist())
            found_T[rest_T] = [digest in self.contents for digest in digests]
        return np.asarray(found_T)

    def named(self, batch: pa.RecordBatch) -> Mask:
        """Which rows are of an erased position, or are called as one was; by their time only where they have one."""
        pos_T = batch["pos"].to_numpy()
        found_T = self.gone.has(pos_T)
        if self.what.before is None or "time" in batch.schema.names:
            found_T |= selects(self.what, batch) & (pos_T < self.gone.end)
        return np.asarray(found_T)

    def to_json(self) -> str:
        """As text, for the receipt's row."""
        return json.dumps(
            {"gone": self.gone.encode().decode(), "contents": sorted(digest.hex() for digest in self.contents)}
        )

    @classmethod
    def from_json(cls, text: str, bank_id: str, what: Selection, generation: int) -> ErasedRows:
        """What `to_json` wrote."""
        found = json.loads(text)
        digests = frozenset(bytes.fromhex(digest) for digest in found["contents"])
        return cls(bank_id, what, generation, Tombstones.decode(found["gone"].encode()), digests)


def selects(what: Selection, batch: pa.RecordBatch) -> Mask:
    """Which rows a selection is about: `condition`, without LanceDB."""
    mask = np.ones(len(batch), dtype=np.bool_)
    for column, label in (("stream", what.stream), ("run", what.run)):
        if label is not None:
            mask &= _true(pc.equal(pc.utf8_normalize(batch[column], "NFC"), composed(label)))
    if what.seq_from is not None:
        mask &= batch["seq"].to_numpy() >= what.seq_from
    if what.seq_to is not None and (what.scope == "rows" or what.before is not None):
        mask &= batch["seq"].to_numpy() < what.seq_to
    if what.before is not None:
        time_T = batch["time"].to_numpy()
        mask &= np.where((time_T >= 0) & (time_T < TIME_END), time_T, 0.0) < what.before
    return mask


def sample(gone: Tombstones) -> set[int]:
    """The positions whose contents are remembered: evenly spread."""
    return set(gone.spread(_SAMPLE))


def contents(batch: pa.RecordBatch, rows: Sequence[int]) -> list[bytes]:
    """Digests of token and hidden states of some rows of a journal or a log."""
    if not rows:
        return []
    picked = batch.take(pa.array(rows))
    tokens = picked["token"].to_numpy().astype("<i8")
    return [
        hashlib.blake2b(token.tobytes() + hidden, digest_size=_DIGEST_BYTES).digest()
        for token, hidden in zip(tokens, _hidden(picked["hidden"]), strict=True)
    ]


def inspect(files: Files, evidence: ErasedRows) -> FileCheck:
    """Decode every file of the bank's tables, of all generations, and of all logs; see FileCheck."""
    tables = [name for name in files.tables() if evidence.bank_id in name or name.startswith("log-")]
    counted = [_inspect(files, name, evidence) for name in tables]
    return FileCheck(*(sum(part) for part in zip(*counted, strict=True))) if counted else FileCheck(0, 0, 0, 0)


def _inspect(files: Files, table: str, evidence: ErasedRows) -> tuple[int, int, int, int]:
    there = files.of(table)
    data = [file for file in there if file.holds_rows]
    kind = table.partition("-")[0]
    find = {"snapshots": _in_snapshots, "attended": _in_attended}.get(kind, _in_rows)
    found, unreadable = find(files, data, evidence)
    return len(there), sum(file.bytes for file in there), found, unreadable


def _in_rows(files: Files, data: Sequence[File], evidence: ErasedRows) -> tuple[int, int]:
    found = unreadable = 0
    for file in data:
        try:
            found += sum(int(evidence.of(batch).sum()) for batch in files.rows(file))
        except (Corrupt, KeyError):
            unreadable += 1
    return found, unreadable


def _in_attended(files: Files, data: Sequence[File], evidence: ErasedRows) -> tuple[int, int]:
    """Keys and values of the rows, by what these were called."""
    found = unreadable = 0
    for file in data:
        try:
            for batch in map(named_rows, files.rows(file, batch_rows=_PIECES)):
                found += int(evidence.named(batch).sum())
        except (Corrupt, KeyError):
            unreadable += 1
    return found, unreadable


def _in_snapshots(files: Files, data: Sequence[File], evidence: ErasedRows) -> tuple[int, int]:
    """Runs' names, and positions, in states; a state older than the rewriting has the rows mixed into it."""
    # manifests first: they say where in a state's bytes each tensor lies
    manifests: dict[str, tuple[int, dict[str, Any]]] = {}
    whole: list[File] = []
    for file in data:
        try:
            for batch in _parts(files, file):
                manifests |= dict(_manifests(batch))
            whole.append(file)
        except (Corrupt, KeyError, ValueError):
            continue
    unreadable, found = len(data) - len(whole), 0
    for name, (pos, manifest) in manifests.items():
        tensors = {key: bytearray() for key in position_tensors(manifest["tensors"])}
        for file in whole:
            for batch in _parts(files, file):
                _collect(batch, name, manifest, tensors)
        older = _generation(data) < evidence.generation and pos > evidence.gone.first
        found += older + _in_state(pos, manifest, tensors, evidence)
    return found, unreadable


def _parts(files: Files, file: File) -> Iterator[pa.RecordBatch]:
    # of 4 MB each
    return files.rows(file, batch_rows=1)


def _generation(data: Sequence[File]) -> int:
    _, _, generation = data[0].table.removeprefix("snapshots-").partition("-")
    return int(generation or 0)


def _manifests(batch: pa.RecordBatch) -> Iterator[tuple[str, tuple[int, dict[str, Any]]]]:
    if batch.filter(pc.greater_equal(batch["start"], 0))["data"].null_count:
        raise Corrupt("a part of a state has no bytes")
    for row in batch.filter(pc.less(batch["start"], 0)).drop_columns(["data"]).to_pylist():
        yield row["snapshot"], (row["pos"], json.loads(row["manifest"]))


def _collect(batch: pa.RecordBatch, snapshot: str, manifest: dict[str, Any], tensors: dict[str, bytearray]) -> None:
    """Take the wanted tensors' bytes out of a state's parts, which come in order."""
    of_it = _true(pc.and_(pc.equal(batch["snapshot"], snapshot), pc.greater_equal(batch["start"], 0)))
    found = batch.filter(pa.array(of_it))
    for begins, data in zip(found["start"].to_pylist(), found["data"].to_pylist(), strict=True):
        start = 0
        for name, header in manifest["tensors"].items():
            stop = start + header["bytes"]
            if name in tensors:
                tensors[name] += data[max(0, start - begins) : max(0, stop - begins)]
            start = stop


def _in_state(pos: int, manifest: dict[str, Any], tensors: dict[str, bytearray], evidence: ErasedRows) -> int:
    found = sum(int(evidence.gone.has(positions(name, bytes(data))).sum()) for name, data in tensors.items())
    what = evidence.what
    # a run that comes back later may have its name back
    if pos > evidence.gone.end or not what.whole:
        return found
    stream, run = what.stream or "", what.run
    names = named_runs(manifest["meta"])
    return found + sum(same(name[0], stream) and (run is None or same(name[1], run)) for name in names)


def _hidden(column: pa.Array) -> Iterable[bytes]:
    if pa.types.is_large_binary(column.type):
        yield from column.to_pylist()
        return
    flat = np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False))
    for row in flat.reshape(len(column), -1):
        yield row.tobytes()


def _true(mask: Any) -> Mask:
    return np.asarray(mask.to_numpy(zero_copy_only=False), dtype=np.bool_)
