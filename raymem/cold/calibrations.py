"""Calibrations: made once for a model and its layers, stored under their hash, never changed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pyarrow as pa
from crc32c import crc32c

from raymem.cold.failures import reading, writing
from raymem.cold.tables import Tables, quote
from raymem.errors import CalibrationNotFound, Corrupt

_TABLE = "calibrations"
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


class Calibrations:
    """Calibration files by hash."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._sync = tables.folder_sync(_TABLE)
        tables.share(_TABLE, _SCHEMA.empty_table())

    def put(self, hash: str, model: str, layers: Sequence[int], blob: bytes) -> None:
        """Store a calibration of `model` (a content hash) and `layers`; one that is there already stays as it is."""
        key = {"hash": hash, "model": model, "layers": json.dumps(list(layers))}
        row = key | {"created": time.time(), "crc32c": crc32c(blob), "data": blob}
        with writing(f"store calibration {hash}"):
            merge = self._tables.open(_TABLE).merge_insert("hash").when_not_matched_insert_all()
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

    def find(self, model: str, layers: Sequence[int]) -> str | None:
        """The hash of the newest calibration of `model` (a content hash) and exactly these layers, if there is one."""
        where = f"model = {quote(model)} AND layers = {quote(json.dumps(list(layers)))}"
        with reading("search the calibrations"):
            found = self._tables.open(_TABLE).search().where(where).select(["hash", "created"]).to_arrow().to_pylist()
        return max(found, key=lambda row: row["created"])["hash"] if found else None
