"""A bank as one file: a zip, stored uncompressed, that safetensors and pyarrow can read without raymem.

::

    manifest.json             format, spec, tags, counts, and each member's bytes and sha256
    journal.arrow             the accepted rows, an Arrow IPC file of `bank_schema`
    calibration.safetensors   what the bank's keys were made with, if the store has it
    params.safetensors        the weights that the bank's mechanism uses, if its spec names any
    state.safetensors         the newest snapshot, if there is one; its position and meta are in the manifest

The state is there for other readers: an import makes it of the rows, see imports.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from safetensors.torch import save

from raymem import __version__
from raymem.errors import CalibrationNotFound
from raymem.rows import JournalRows
from raymem.storage.catalog import Entry
from raymem.storage.export.manifest import (
    CALIBRATION,
    FORMAT,
    JOURNAL,
    MANIFEST,
    MANIFEST_BYTES,
    PARAMS,
    STATE,
    VERSION,
    ExportedState,
    ExportManifest,
    Member,
)
from raymem.storage.journal.fork_journal import steady
from raymem.storage.journal.tombstones import Tombstones, bank_schema
from raymem.storage.kway_merge import Tally, merged
from raymem.storage.snapshots import Snapshot
from raymem.storage.store import ColdStore
from raymem.storage.tables.disk import fsync, writing
from raymem.types import BankSpec

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: where, how many rows, and the file's bytes."""

    path: Path
    rows: int
    bytes: int


def export_bank(store: ColdStore, name: str, path: str | Path, progress: Progress | None = None) -> ExportReport:
    """Write a bank to one file, which appears under `path` only when it is whole and on disk.

    The file of a partitioned bank is that of one bank: one journal with the rows of all partitions by their times, the
    sum of their budgets, and no state.

    Args:
        store: the cold store.
        name: the bank; rows that it accepts meanwhile may be left out.
        path: replaced if it is there.
        progress: called with rows written and rows in all.

    Raises:
        BankNotFound, Corrupt, StorageError, Conflict (rows were erased meanwhile): no file is left behind.
    """
    layout = store.partitions.get(name)
    parts = store.partitions.entries(layout)
    journals = [store.journal(part) for part in parts]
    with steady(store.catalog, *parts):
        # first the snapshot: the journal then reaches at least as far
        found = _told(store.state(layout.entry)) if layout.whole else None
        ends = [journal.end() for journal in journals]
        tombstones = journals[0].tombstones() if layout.whole else Tombstones()
    scans = [journal.scan(stop=end) for journal, end in zip(journals, ends, strict=True)]
    if layout.whole:
        content = _Content(parts, scans[0], found, tombstones, int(tombstones.rank(np.array(ends))[0]))
        return _export(store, layout.entry, Path(path), content, progress)
    # a row that two partitions have, on its way from one to the other, is there once
    tables = merged(scans, layout.parts, [""] * len(parts), Tally())
    spec = parts[0].spec
    spec = spec.model_copy(update={"budget_bytes": len(parts) * spec.budget_bytes})
    rows = (rows for table in tables for rows in JournalRows.from_arrow(table))
    entry = dataclasses.replace(layout.entry, spec=spec)
    return _export(store, entry, Path(path), _Content(parts, rows, None, Tombstones(), 0), progress)


@dataclass
class _Content:
    """What a file is made of, and of which banks: `rows` counts what the journal gives, if that is not known before."""

    banks: Sequence[Entry]
    journal: Iterable[JournalRows]
    state: Snapshot | None
    tombstones: Tombstones
    rows: int


def _export(store: ColdStore, entry: Entry, path: Path, content: _Content, progress: Progress | None) -> ExportReport:
    found, schema = content.state, bank_schema(entry.spec, content.tombstones)
    with (
        _appearing(path) as file,
        steady(store.catalog, *content.banks),
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        write = partial(_write_journal, schema=schema, content=content, progress=progress)
        members = {JOURNAL: _write(archive, JOURNAL, write)}
        blob = _calibration(store, entry.spec)
        if blob is not None:
            members[CALIBRATION] = _write(archive, CALIBRATION, lambda out: out.write(blob))
        if entry.spec.params:
            weights = store.params.get(entry.spec.params)
            members[PARAMS] = _write(archive, PARAMS, lambda out: out.write(weights))
        if found is not None:
            state = save(found[1])
            members[STATE] = _write(archive, STATE, lambda out: out.write(state))
        manifest = ExportManifest(
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
            end=content.rows + len(content.tombstones),
            state=None if found is None else ExportedState(pos=found[0], meta=found[2]),
            members=members,
        )
        archive.writestr(MANIFEST, manifest.model_dump_json(indent=1))
    return ExportReport(path, content.rows, path.stat().st_size)


def _told(found: Snapshot | None) -> Snapshot | None:
    """A state whose names a manifest has room for; without it the rows are replayed."""
    return None if found is None or 2 * len(json.dumps(found[2])) > MANIFEST_BYTES else found


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


def _write(archive: zipfile.ZipFile, name: str, write: Callable[[Any], object]) -> Member:
    with archive.open(name, "w", force_zip64=True) as out:
        hashing = _Hashing(out)
        write(hashing)
    return Member(bytes=hashing.bytes, sha256=hashing.sha256.hexdigest())


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
