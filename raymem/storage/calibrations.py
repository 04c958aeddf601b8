"""Calibrations: made once for a model and its layers, stored under their hash, never changed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pyarrow as pa
from crc32c import crc32c

from raymem.encode.calibration import Calibration
from raymem.errors import CalibrationNotFound, Corrupt, InvalidInput
from raymem.logs import get_logger
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables, quote

_TABLE = "calibrations"
# as if it had been made before any that was made here
_BROUGHT = 0.0
_SCHEMA = pa.schema(
    [
        pa.field("hash", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("layers", pa.string(), nullable=False),
        pa.field("created", pa.float64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)


_log = get_logger(__name__)


class Calibrations:
    """Calibration files by hash."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._sync = tables.folder_sync(_TABLE)
        tables.share(_TABLE, _SCHEMA.empty_table())

    def put(self, hash: str, model: str, layers: Sequence[int], blob: bytes) -> None:
        """Store a calibration of `model` (a content hash) and `layers`; one that is there already stays as it is."""
        self._put({"hash": hash, "model": model, "layers": json.dumps(list(layers))}, time.time(), blob)

    def bring(self, calibration: Calibration) -> None:
        """Store one that came with a bank: new banks take it only where none was made here for its model."""
        layers = json.dumps(list(calibration.layers))
        key = {"hash": calibration.hash, "model": calibration.model, "layers": layers}
        self._put(key, _BROUGHT, calibration.to_bytes())

    def _put(self, key: dict[str, str], created: float, blob: bytes) -> None:
        row = key | {"created": created, "crc32c": crc32c(blob), "data": blob}
        with writing(f"store calibration {key['hash']}"):
            merge = self._tables.open(_TABLE).merge_insert("hash").when_not_matched_insert_all()
            if created != _BROUGHT:
                merge = merge.when_matched_update_all(where=f"target.created = {_BROUGHT}")
            merge.execute(pa.Table.from_pylist([row], schema=_SCHEMA))
            if self._sync:
                self._sync.sync()

    def get(self, hash: str) -> bytes:
        """The calibration stored under `hash`.

        Raises:
            CalibrationNotFound: there is none. Corrupt: its checksum does not hold.
        """
        with reading(f"read calibration {hash}"):
            found = self._tables.open(_TABLE).search().where(f"hash = {quote(hash)}").to_arrow().to_pylist()
        if not found:
            raise CalibrationNotFound(f"the store has no calibration {hash}; make one with `raymem calibrate`")
        blob: bytes = found[0]["data"]
        if crc32c(blob) != found[0]["crc32c"]:
            raise Corrupt(f"calibration {hash} does not match its checksum; make it again with `raymem calibrate`")
        return blob

    def find(self, model: str, layers: Sequence[int]) -> Calibration | None:
        """The newest sound calibration of `model` (a content hash) and exactly these layers, if there is one.

        One that can't be used, as earlier releases kept, is passed over.

        Raises:
            Corrupt: none of those that are there is sound, naming the newest and what is wrong with it.
        """
        where = f"model = {quote(model)} AND layers = {quote(json.dumps(list(layers)))}"
        with reading("search the calibrations"):
            found = self._tables.open(_TABLE).search().where(where).select(["hash", "created"]).to_arrow().to_pylist()
        wrong: Corrupt | None = None
        for row in sorted(found, key=lambda row: -row["created"]):
            try:
                return self.sound(row["hash"])
            except Corrupt as error:
                _log.warning("calibration passed over", calibration=row["hash"], reason=error.message)
                wrong = wrong or error
        if wrong is not None:
            raise wrong
        return None

    def sound(self, hash: str) -> Calibration:
        """The calibration stored under `hash`, checked as one that new banks may be made with.

        Raises:
            CalibrationNotFound: there is none. Corrupt: it can't be used; make one with `raymem calibrate`.
        """
        try:
            return Calibration.from_bytes(self.get(hash)).check()
        except (Corrupt, InvalidInput) as error:
            raise Corrupt(
                f"calibration {hash} of this store can't be used: {error.message}. make another with `raymem "
                "calibrate`; new banks take that one"
            ) from error
