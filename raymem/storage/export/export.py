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

import hashlib
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from raymem import __version__
from raymem.errors import CalibrationNotFound
from raymem.rows import JournalRows
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
from raymem.tensors import save_safetensors

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
        found = _that_fits(store.state(layout.entry)) if layout.whole else None
        ends = [journal.end() for journal in journals]
        tombstones = journals[0].tombstones() if layout.whole else Tombstones()
    scans = [journal.scan(stop=end) for journal, end in zip(journals, ends, strict=True)]
    entry, path, budget = layout.entry, Path(path), sum(part.spec.budget_bytes for part in parts)
    spec = entry.spec.model_copy(update={"budget_bytes": budget})
    schema, rows = bank_schema(spec, tombstones), 0
    if layout.whole:
        journal: Iterable[JournalRows] = scans[0]
        rows = int(tombstones.rank(np.array(ends))[0])
    else:
        # a row that two partitions have, on its way from one to the other, is there once
        tables = merged(scans, layout.parts, [""] * len(parts), Tally())
        journal = (piece for table in tables for piece in JournalRows.from_arrow(table))

    def write_journal(out: Any) -> None:
        nonlocal rows
        done = 0
        with pa.ipc.new_file(pa.PythonFile(out, "w"), schema) as writer:
            for piece in journal:
                writer.write_table(piece.to_arrow().replace_schema_metadata(schema.metadata))
                done += len(piece)
                rows = max(rows, done)
                if progress:
                    progress(done, rows)

    with (
        _appearing(path) as file,
        steady(store.catalog, *parts),
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        members = {JOURNAL: _write(archive, JOURNAL, write_journal)}
        blob = b""
        with suppress(CalibrationNotFound):
            blob = store.calibrations.get(spec.fingerprint.calibration)
        if blob:
            members[CALIBRATION] = _write(archive, CALIBRATION, lambda out: out.write(blob))
        if spec.params:
            weights = store.params.get(spec.params)
            members[PARAMS] = _write(archive, PARAMS, lambda out: out.write(weights))
        if found is not None:
            state = save_safetensors(found[1])
            members[STATE] = _write(archive, STATE, lambda out: out.write(state))
        manifest = ExportManifest(
            format=FORMAT,
            version=VERSION,
            made_by=f"raymem {__version__}",
            bank=entry.name,
            spec=spec,
            epoch=entry.epoch,
            created=entry.created,
            exported=time.time(),
            tags=entry.tags,
            rows=rows,
            end=rows + len(tombstones),
            state=None if found is None else ExportedState(pos=found[0], meta=found[2]),
            members=members,
        )
        archive.writestr(MANIFEST, manifest.model_dump_json(indent=1))
    return ExportReport(path, rows, path.stat().st_size)


def _that_fits(found: Snapshot | None) -> Snapshot | None:
    """The snapshot, if a manifest has room for its metadata; without it the rows are replayed."""
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
