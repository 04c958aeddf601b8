"""A bank from an exported file: every field and every row is checked before anything of it can be seen.

What the store decides itself is not taken from a file: the bank's identity, its owner and epoch, when it was made. Nor
is its state, which is a function of the rows: the first attach makes it from them.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import pyarrow as pa

from raymem.encode.calibration import Calibration
from raymem.encode.encoder import assemble, mechanism
from raymem.errors import CalibrationNotFound, Corrupt, InvalidInput
from raymem.memory.learned import Learned
from raymem.rows import JournalRows, Trace
from raymem.storage.catalog import Entry
from raymem.storage.export import arrow
from raymem.storage.export.archive import Archive, opened
from raymem.storage.export.export import Progress
from raymem.storage.export.manifest import CALIBRATION, COUNT_END, JOURNAL, PARAMS
from raymem.storage.journal.tombstones import TOMBSTONES, Tombstones, bank_schema
from raymem.storage.store import ColdStore
from raymem.types import BankSpec, check_bank_name, check_label

T = TypeVar("T")
_PARAMS_BYTES = 2**31
_HEAD_BYTES = 2**21
# an Arrow file is this, then a stream, then an index of it, which reading it through does without
_ARROW_FILE = b"ARROW1\0\0"


def import_bank(store: ColdStore, path: str | Path, name: str, progress: Progress | None = None) -> Entry:
    """Create a cold bank from an exported file.

    Args:
        store: the cold store.
        path: what `export_bank` wrote.
        name: the new bank's; it gets its journal, calibration, weights and tags, and an identity of its own.
        progress: called with rows read and rows in all.

    Raises:
        InvalidInput: the file can't be opened. Corrupt: naming the member, the field and the value that did not hold.
            TooLarge: a member is over its limit. BankExists: the name is taken. In each case nothing was made.
    """
    check_bank_name(name)
    with opened(Path(path)) as archive:
        archive.verify()
        manifest = archive.manifest
        calibration, learned = _calibration(archive), _params(archive)
        _require_usable(store, archive, calibration, learned and learned[1])
        entry = Entry(
            id=uuid.uuid4().hex,
            name=name,
            spec=manifest.spec,
            created=time.time(),
            tags={check_label("tag", tag): pos for tag, pos in manifest.tags.items()},
        )
        with archive.open(JOURNAL) as file:
            rows = _ImportedRows(archive, file)

            def checked() -> Iterator[pa.RecordBatch]:
                yield from rows.batches(progress)
                # every row was sound: what the bank needs comes before the line that makes it visible
                if calibration is not None:
                    store.calibrations.bring(calibration)
                if learned is not None:
                    store.params.put(manifest.spec.kind, learned[0])

            return store.catalog.add(entry, checked(), rows.tombstones)


class _ImportedRows:
    """The journal of a file, row by row as a bank takes rows."""

    def __init__(self, archive: Archive, file: IO[bytes]) -> None:
        self._archive = archive
        self._manifest = archive.manifest
        self._heads: dict[tuple[str, str], int] = {}
        self._expect = self._done = 0
        with archive.damaged(JOURNAL):
            if file.read(len(_ARROW_FILE)) != _ARROW_FILE:
                raise archive.corrupt(JOURNAL, "is not an Arrow file")
            schema, self._batches = self._sound(lambda: arrow.batches(file, bank_schema(self._manifest.spec)))
        self.tombstones = self._tombstones((schema.metadata or {}).get(TOMBSTONES))
        self._schema = bank_schema(self._manifest.spec, self.tombstones)

    def batches(self, progress: Progress | None) -> Iterator[pa.RecordBatch]:
        """Batches of the bank's own table.

        Raises:
            Corrupt: naming the row and what is wrong with it.
        """
        while (batch := self._sound(lambda: next(self._batches, None))) is not None:
            for rows in self._sound(partial(_pieces, batch)):
                taken = self._take(rows)
                yield from taken.to_arrow().replace_schema_metadata(self._schema.metadata).to_batches()
            if progress:
                progress(self._done, self._manifest.rows)
        self._require_end()

    def _tombstones(self, text: bytes | None) -> Tombstones | None:
        return None if text is None else self._sound(lambda: Tombstones.decode(text, self._archive.rows_at_most + 1))

    def _require_end(self) -> None:
        rows, end, tombstones = self._manifest.rows, self._manifest.last, self.tombstones or Tombstones()
        if self._done != rows:
            raise self._archive.corrupt(JOURNAL, f"holds {self._done} rows, and the manifest says {rows}")
        if rows + len(tombstones) != end or tombstones.end > end:
            raise self._archive.corrupt(
                JOURNAL,
                f"ends at {tombstones.end} with {len(tombstones)} positions erased; the manifest says end {end}",
            )

    def _take(self, rows: JournalRows) -> JournalRows:
        """These rows under epoch 0, if they are the next ones; names stay as an earlier version spelled them."""
        self._sound(rows.verify)
        at = (self.tombstones or Tombstones()).wrong(rows.pos_T, self._expect)
        if at is not None:
            raise self._archive.corrupt(
                JOURNAL, f"has pos {int(rows.pos_T[at])} in row {self._done + at}, out of order"
            )
        self._validate(rows)
        for stream, run, seq in zip(rows.streams, rows.runs, rows.seq_T.tolist(), strict=True):
            if seq <= self._heads.get((stream, run), -1):
                raise self._archive.corrupt(
                    JOURNAL, f"has seq {seq} of stream {stream!r} run {run!r} twice or too late"
                )
            self._heads[stream, run] = seq
        self._expect, self._done = int(rows.pos_T[-1]) + 1, self._done + len(rows)
        return dataclasses.replace(rows, epoch=0)

    def _validate(self, rows: JournalRows) -> None:
        """Every row is one that could have been written."""
        fingerprint = self._manifest.spec.fingerprint
        stream, run = rows.streams[0], rows.runs[0]
        seqs, times = rows.seq_T.tolist(), rows.time_T.tolist()
        ends = [(min(seqs), min(times)), (max(seqs), max(times, key=lambda at: (at != at, at)))]
        if not 0 <= min(seqs) <= max(seqs) < COUNT_END:
            raise self._archive.corrupt(JOURNAL, f"has seq {min(seqs)} to {max(seqs)}; they are 0 to {COUNT_END - 1}")
        last = rows.part(len(rows) - 1)
        try:
            for label in {*rows.streams, *rows.runs}:
                check_label("a stream or run", label)
            Trace(rows.hidden_TLD, rows.token_T, stream, run, values=rows.value_TV).validate(fingerprint)
            # a domain is what lies between two ends, and a NaN comes out at the end
            for seq, moment in ends:
                Trace(last.hidden_TLD, last.token_T, stream, run, seq, last.value_TV, moment).validate(fingerprint)
        except InvalidInput as error:
            raise self._archive.corrupt(
                JOURNAL, f"has rows from pos {int(rows.pos_T[0])} on that no bank takes: {error.message}"
            ) from error

    def _sound(self, read: Callable[[], T]) -> T:
        try:
            with self._archive.damaged(JOURNAL):
                return read()
        except Corrupt as error:
            if error.details.get("member"):
                raise
            raise self._archive.corrupt(JOURNAL, f"is damaged: {error.message}") from error


def _pieces(batch: pa.RecordBatch) -> list[JournalRows]:
    for name in batch.schema.names:
        inner = batch[name].flatten().null_count if pa.types.is_nested(batch[name].type) else 0
        if inner or (batch[name].null_count and name != "value"):
            raise Corrupt(f"rows have no {name}")
    return JournalRows.from_arrow(pa.Table.from_batches([batch]))


def _calibration(archive: Archive) -> Calibration | None:
    fingerprint = archive.manifest.spec.fingerprint
    if CALIBRATION not in archive.manifest.members:
        return None
    most = 4 * len(fingerprint.layers) * fingerprint.width * (fingerprint.width + 1) + _HEAD_BYTES
    try:
        found = Calibration.from_bytes(archive.read(CALIBRATION, most)).check()
    except (Corrupt, InvalidInput) as error:
        raise archive.corrupt(CALIBRATION, f"is not sound: {error.message}") from error
    if found.hash != fingerprint.calibration:
        raise archive.corrupt(
            CALIBRATION, f"is not the calibration {fingerprint.calibration} that the bank was made with"
        )
    return found


def _params(archive: Archive) -> tuple[bytes, Learned] | None:
    wanted = archive.manifest.spec.params
    if not wanted:
        return None
    blob = archive.read(PARAMS, _PARAMS_BYTES)
    try:
        return blob, Learned.from_bytes(blob, wanted)
    except Corrupt as error:
        raise archive.corrupt(PARAMS, f"is not the weights {wanted} that the bank uses: {error.message}") from error


def _require_usable(
    store: ColdStore, archive: Archive, calibration: Calibration | None, learned: Learned | None
) -> None:
    """Put together what the spec asks for, so that an attach can."""
    spec: BankSpec = archive.manifest.spec
    try:
        if calibration is None:
            with suppress(CalibrationNotFound):
                calibration = store.calibrations.load(spec.fingerprint.calibration)
        if calibration is None:
            layers = spec.key.layers or spec.fingerprint.layers
            mechanism(spec, len(layers) * spec.fingerprint.width, learned)
        else:
            assemble(spec, calibration, learned)
    except InvalidInput as error:
        raise archive.corrupt("spec of manifest.json", f"can't be used: {error.message}") from error
