"""A bank as one file: a zip, stored uncompressed, that safetensors and pyarrow can read without raymem.

::

    manifest.json             format, spec, tags, counts, and each member's bytes and sha256
    journal.arrow             the accepted rows, an Arrow IPC file of `bank_schema`
    calibration.safetensors   what the bank's keys were made with, if the store has it
    params.safetensors        the weights that the bank's mechanism uses, if its spec names any
    state.safetensors         the newest snapshot, if there is one; its position and meta are in the manifest
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save

from raymem import __version__
from raymem.cold.catalog import Entry
from raymem.cold.durable import fsync
from raymem.cold.failures import reading, writing
from raymem.cold.holes import HOLES, Holes
from raymem.cold.interleave import Tally, merged
from raymem.cold.lineage import steady
from raymem.cold.rows import JournalRows, bank_schema
from raymem.cold.snapshots import Snapshot
from raymem.cold.store import ColdStore
from raymem.cold.tables import snapshot_table
from raymem.encode.calibration import Calibration
from raymem.errors import BankExists, BankNotFound, CalibrationNotFound, Corrupt, InvalidInput
from raymem.memory.learned import name_of
from raymem.types import BankSpec, check_bank_name

FORMAT = "raymem-bank"
VERSION = 2
# what this release reads; 1 had no erased rows
_READS = (1, 2)
_MANIFEST, _JOURNAL, _STATE, _CALIBRATION, _PARAMS = (
    "manifest.json",
    "journal.arrow",
    "state.safetensors",
    "calibration.safetensors",
    "params.safetensors",
)
_CHUNK_BYTES = 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: where, how many rows, and the file's bytes."""

    path: Path
    rows: int
    bytes: int


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Member(_Frozen):
    bytes: int
    sha256: str


class _State(_Frozen):
    pos: int
    meta: dict[str, Any]


class Manifest(_Frozen):
    """The compatibility surface of the format: what `manifest.json` says."""

    format: str
    version: int
    made_by: str
    bank: str
    spec: BankSpec
    epoch: int
    created: float
    exported: float
    tags: dict[str, int]
    rows: int
    end: int | None = None
    state: _State | None
    members: dict[str, _Member]


def export_bank(store: ColdStore, name: str, path: str | Path, progress: Progress | None = None) -> ExportReport:
    """Write a bank to one file, which appears under `path` only when it is whole and on disk.

    Args:
        store: the cold store.
        name: the bank; rows that it accepts meanwhile may be left out.
        path: replaced if it is there.
        progress: called with rows written and rows in all.

    Raises:
        BankNotFound, Corrupt, StorageError, Conflict (rows were erased meanwhile): no file is left behind.
    """
    entry = store.catalog.get(name)
    journal = store.journal(entry)
    with steady(store.catalog, entry):
        # first the snapshot: the journal then reaches at least as far
        found = store.state(entry)
        end, holes = journal.end(), journal.holes()
    rows = int(holes.rank(np.array([end]))[0])
    content = _Content([entry], journal.scan(stop=end), found, holes, rows)
    return _export(store, entry, Path(path), content, progress)


def export_together(store: ColdStore, name: str, parts: Sequence[str], path: str | Path) -> ExportReport:
    """As `export_bank`, of a partitioned bank: one journal with the rows of all partitions by time, and no state.

    A row that two of them have, on its way from one to the other, is there once. The budget is their sum.
    """
    entries = [store.catalog.get(part) for part in parts]
    spec = entries[0].spec
    spec = spec.model_copy(update={"budget_bytes": len(parts) * spec.budget_bytes})
    tables = merged([store.journal(entry).scan() for entry in entries], parts, [""] * len(parts), Tally())
    rows = (rows for table in tables for rows in JournalRows.from_arrow(table))
    entry = dataclasses.replace(store.catalog.get(name), spec=spec)
    return _export(store, entry, Path(path), _Content(entries, rows, None, Holes(), 0), None)


@dataclass
class _Content:
    """What a file is made of, and of which banks: `rows` counts what the journal gives, if that is not known before."""

    banks: Sequence[Entry]
    journal: Iterable[JournalRows]
    state: Snapshot | None
    holes: Holes
    rows: int


def _export(store: ColdStore, entry: Entry, path: Path, content: _Content, progress: Progress | None) -> ExportReport:
    found, schema = content.state, bank_schema(entry.spec, content.holes)
    with (
        _appearing(path) as file,
        steady(store.catalog, *content.banks),
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        write = partial(_write_journal, schema=schema, content=content, progress=progress)
        members = {_JOURNAL: _write(archive, _JOURNAL, write)}
        blob = _calibration(store, entry.spec)
        if blob is not None:
            members[_CALIBRATION] = _write(archive, _CALIBRATION, lambda out: out.write(blob))
        if entry.spec.params:
            weights = store.params.get(entry.spec.params)
            members[_PARAMS] = _write(archive, _PARAMS, lambda out: out.write(weights))
        if found is not None:
            state = save(found[1])
            members[_STATE] = _write(archive, _STATE, lambda out: out.write(state))
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            made_by=f"raymem {__version__}",
            bank=entry.name,
            spec=entry.spec,
            epoch=entry.epoch,
            created=entry.created,
            exported=time.time(),
            tags=entry.tags,
            rows=content.rows,
            end=content.rows + len(content.holes),
            state=None if found is None else _State(pos=found[0], meta=found[2]),
            members=members,
        )
        archive.writestr(_MANIFEST, manifest.model_dump_json(indent=1))
    return ExportReport(path, content.rows, path.stat().st_size)


def import_bank(store: ColdStore, path: str | Path, name: str, progress: Progress | None = None) -> Entry:
    """Create a cold bank from an exported file, after every hash in it held.

    Args:
        store: the cold store.
        path: what `export_bank` wrote.
        name: the new bank's; it gets its journal, state, calibration and tags, and an identity of its own.
        progress: called with rows read and rows in all.

    Raises:
        InvalidInput: the file can't be opened. Corrupt: naming the member that did not hold. BankExists: the name is
            taken. In each case nothing was made.
    """
    check_bank_name(name)
    with _opened(Path(path)) as archive:
        manifest = _manifest(archive, Path(path))
        for member, expected in manifest.members.items():
            _check(archive, Path(path), member, expected)
        _require_free(store, name)
        entry = Entry(
            id=uuid.uuid4().hex,
            name=name,
            spec=manifest.spec,
            epoch=manifest.epoch,
            created=time.time(),
            tags=manifest.tags,
        )
        _import_calibration(store, archive, manifest, Path(path))
        _import_params(store, archive, manifest, Path(path))
        try:
            # the catalog's row comes last: until then nobody can see any of it
            _import_state(store, archive, manifest, entry)
            with archive.open(_JOURNAL) as file:
                holes = _holes(file, Path(path))
                return store.catalog.add(entry, _read_journal(file, manifest, Path(path), progress), holes)
        except BaseException:
            store.tables.drop(snapshot_table(entry.id))
            raise


def _import_calibration(store: ColdStore, archive: zipfile.ZipFile, manifest: Manifest, path: Path) -> None:
    if _CALIBRATION not in manifest.members:
        return
    blob, fingerprint = archive.read(_CALIBRATION), manifest.spec.fingerprint
    if Calibration.from_bytes(blob).hash != fingerprint.calibration:
        raise _corrupt(
            path, _CALIBRATION, f"is not the calibration {fingerprint.calibration} that the bank was made with"
        )
    store.calibrations.put(fingerprint.calibration, fingerprint.content, fingerprint.layers, blob)


def _import_params(store: ColdStore, archive: zipfile.ZipFile, manifest: Manifest, path: Path) -> None:
    wanted = manifest.spec.params
    if not wanted:
        return
    blob = archive.read(_PARAMS) if _PARAMS in manifest.members else b""
    if name_of(blob) != wanted:
        raise _corrupt(path, _PARAMS, f"is not the weights {wanted} that the bank uses")
    store.params.put(manifest.spec.kind, blob)


def _import_state(store: ColdStore, archive: zipfile.ZipFile, manifest: Manifest, entry: Entry) -> None:
    if manifest.state is None:
        return
    with reading(f"read {_STATE} of {manifest.bank}"):
        tensors = load(archive.read(_STATE))
    store.snapshots(entry).save(manifest.state.pos, tensors, manifest.state.meta)


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block has ended well and it is on disk."""
    with writing(f"export to {path}"):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with writing(f"export to {path}", only=OSError):
            with os.fdopen(handle, "wb") as file:
                yield file
            fsync(Path(temporary))
            os.replace(temporary, path)
            fsync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class _Hashing:
    """A member being written, hashed on the way."""

    closed = False

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        with memoryview(data) as view:
            self.sha256.update(view)
            self.bytes += view.nbytes
            return self._out.write(view)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        pass


def _write(archive: zipfile.ZipFile, name: str, write: Callable[[Any], object]) -> _Member:
    with archive.open(name, "w", force_zip64=True) as out:
        hashing = _Hashing(out)
        write(hashing)
    return _Member(bytes=hashing.bytes, sha256=hashing.sha256.hexdigest())


def _write_journal(out: Any, schema: pa.Schema, content: _Content, progress: Progress | None) -> None:
    done = 0
    with pa.ipc.new_file(pa.PythonFile(out, "w"), schema) as writer:
        for piece in content.journal:
            writer.write_table(piece.to_arrow().replace_schema_metadata(schema.metadata))
            done += len(piece)
            content.rows = max(content.rows, done)
            if progress:
                progress(done, content.rows)


def _calibration(store: ColdStore, spec: BankSpec) -> bytes | None:
    try:
        return store.calibrations.get(spec.fingerprint.calibration)
    except CalibrationNotFound:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise _corrupt(path, "the file", f"is not a whole export ({error})") from error
    except OSError as error:
        raise InvalidInput(f"can't read {path}: {error}") from error
    with archive:
        yield archive


def _manifest(archive: zipfile.ZipFile, path: Path) -> Manifest:
    try:
        data = json.loads(archive.read(_MANIFEST))
    except (KeyError, zipfile.BadZipFile, ValueError) as error:
        raise _corrupt(path, _MANIFEST, f"can't be read ({error})") from error
    said = (data.get("format"), data.get("version")) if isinstance(data, dict) else None
    if said not in [(FORMAT, version) for version in _READS]:
        raise Corrupt(
            f"{path} says it is {said}; this raymem reads {FORMAT} of versions {', '.join(map(str, _READS))}: use the "
            "release that wrote it, or a later one"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise _corrupt(path, _MANIFEST, f"does not make sense ({error})") from error
    end = manifest.rows if manifest.end is None else manifest.end
    if manifest.state and manifest.state.pos > end:
        raise _corrupt(path, _MANIFEST, f"has a state at pos {manifest.state.pos} and ends at {end}")
    needed = {_JOURNAL} | ({_STATE} if manifest.state else set())
    if missing := needed - set(manifest.members):
        raise _corrupt(path, _MANIFEST, f"does not list {', '.join(sorted(missing))}")
    return manifest


def _check(archive: zipfile.ZipFile, path: Path, name: str, expected: _Member) -> None:
    hashed, size = hashlib.sha256(), 0
    try:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise _corrupt(path, name, "is compressed, which no export is")
        with archive.open(name) as file:
            while chunk := file.read(_CHUNK_BYTES):
                hashed.update(chunk)
                size += len(chunk)
                if size > expected.bytes:
                    break
    except (KeyError, zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:
        raise _corrupt(path, name, f"can't be read ({error})") from error
    if (size, hashed.hexdigest()) != (expected.bytes, expected.sha256):
        raise _corrupt(path, name, "does not match its hash in the manifest")


def _holes(file: IO[bytes], path: Path) -> Holes | None:
    """The positions whose rows were erased before the bank was exported."""
    text = (_arrow(file, path).schema.metadata or {}).get(HOLES)
    return None if text is None else Holes.decode(text)


def _arrow(file: IO[bytes], path: Path) -> pa.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid as error:
        raise _corrupt(path, _JOURNAL, f"is not an Arrow file ({error})") from error


def _read_journal(
    file: IO[bytes], manifest: Manifest, path: Path, progress: Progress | None
) -> Iterable[pa.RecordBatch]:
    reader = _arrow(file, path)
    schema, done = bank_schema(manifest.spec), 0
    if not reader.schema.equals(schema):
        raise _corrupt(path, _JOURNAL, f"has another schema than its spec says: {reader.schema}")
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        for rows in JournalRows.from_arrow(pa.Table.from_batches([batch], schema=schema)):
            rows.verify()
        done += len(batch)
        if progress:
            progress(done, manifest.rows)
        yield batch.replace_schema_metadata(reader.schema.metadata)
    if done != manifest.rows:
        raise _corrupt(path, _JOURNAL, f"holds {done} rows, and the manifest says {manifest.rows}")


def _require_free(store: ColdStore, name: str) -> None:
    try:
        store.catalog.get(name)
    except BankNotFound:
        return
    raise BankExists(f"bank {name} exists already; import under another name or remove it first")


def _corrupt(path: Path, member: str, why: str) -> Corrupt:
    return Corrupt(f"{member} in {path} {why}; nothing was imported. export the bank again", member=member)
