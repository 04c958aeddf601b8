"""Files stored under their hash and never changed: calibrations, and weights that were learned."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from crc32c import crc32c

from raymem.encode.calibration import Calibration
from raymem.errors import CalibrationNotFound, Corrupt, InvalidInput, NotFound
from raymem.logs import get_logger
from raymem.memory.learned import name_of
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables, quote

_CALIBRATIONS = pa.schema(
    [
        pa.field("hash", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("layers", pa.string(), nullable=False),
        pa.field("created", pa.float64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)
_PARAMS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("created", pa.float64(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)
# when a calibration was made that came with a bank: before any that was made here
_BROUGHT = 0.0
# the banks of a host have few models
_RECENT = 4
_log = get_logger(__name__)


class ContentStore:
    """One table of such files. Its first column is the hash; a file that is there already stays as it is.

    Args:
        tables: the cold store's.
        name: of the table.
        schema: of the table.
    """

    def __init__(self, tables: Tables, name: str, schema: pa.Schema) -> None:
        self._tables = tables
        self._name = name
        self._schema = schema
        self._key = schema.names[0]
        self._sync = tables.folder_sync(name)
        tables.share(name, schema.empty_table())

    def _store(self, row: dict[str, Any], instead_of: str | None = None) -> None:
        """Add a row, durably; with a condition, also in place of the row of its hash that meets it."""
        with writing(f"store {row[self._key]} in {self._name}"):
            merge = self._tables.open(self._name).merge_insert(self._key).when_not_matched_insert_all()
            if instead_of is not None:
                merge = merge.when_matched_update_all(where=instead_of)
            merge.execute(pa.Table.from_pylist([row], schema=self._schema))
            if self._sync:
                self._sync.sync()

    def _select(self, columns: Sequence[str], **of: str) -> list[dict[str, Any]]:
        where = " AND ".join(f"{column} = {quote(value)}" for column, value in of.items())
        with reading(f"read {', '.join(of.values())} in {self._name}"):
            query = self._tables.open(self._name).search().where(where).select([*columns])
            found: list[dict[str, Any]] = query.to_arrow().to_pylist()
        return found


class Calibrations(ContentStore):
    """Calibrations, each of a model and its layers."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables, "calibrations", _CALIBRATIONS)
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, Calibration] = OrderedDict()

    def put(self, hash: str, model: str, layers: Sequence[int], blob: bytes) -> None:
        """Store a calibration of `model` (a content hash) and `layers`."""
        row = {"hash": hash, "model": model, "layers": json.dumps(list(layers)), "created": time.time()}
        self._store(row | {"crc32c": crc32c(blob), "data": blob}, f"target.created = {_BROUGHT}")

    def bring(self, made: Calibration) -> None:
        """Store one that came with a bank: new banks take it only where none was made here for its model."""
        row = {"hash": made.hash, "model": made.model, "layers": json.dumps(list(made.layers)), "created": _BROUGHT}
        blob = made.to_bytes()
        self._store(row | {"crc32c": crc32c(blob), "data": blob})

    def get(self, hash: str) -> bytes:
        """The calibration stored under `hash`, as a file.

        Raises:
            CalibrationNotFound: there is none. Corrupt: its checksum does not hold.
        """
        found = self._select(["data", "crc32c"], hash=hash)
        if not found:
            raise CalibrationNotFound(f"the store has no calibration {hash}; make one with `raymem calibrate`")
        blob: bytes = found[0]["data"]
        if crc32c(blob) != found[0]["crc32c"]:
            raise Corrupt(f"calibration {hash} does not match its checksum; make it again with `raymem calibrate`")
        return blob

    def load(self, hash: str) -> Calibration:
        """The calibration stored under `hash`; banks of one model share it.

        Raises:
            As `get`.
        """
        with self._lock:
            recent = self._recent.pop(hash, None)
        calibration = recent or Calibration.from_bytes(self.get(hash))
        with self._lock:
            self._recent[hash] = calibration
            while len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return calibration

    def find(self, model: str, layers: Sequence[int]) -> Calibration | None:
        """The newest sound calibration of `model` (a content hash) and exactly these layers, if there is one.

        One that can't be used, as earlier releases kept, is passed over.

        Raises:
            Corrupt: none of those that are there is sound, naming the newest and what is wrong with it.
        """
        found = self._select(["hash", "created"], model=model, layers=json.dumps(list(layers)))
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


class Params(ContentStore):
    """Weights that were learned, as safetensors files; their names are `sha256:` and the hash of their bytes."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables, "params", _PARAMS)

    def put(self, kind: str, blob: bytes) -> str:
        """Store a file and return its name."""
        name = name_of(blob)
        self._store({"name": name, "kind": kind, "created": time.time(), "data": blob})
        return name

    def get(self, name: str) -> bytes:
        """The file of that name.

        Raises:
            NotFound: there is none. Corrupt: its bytes don't have that hash.
        """
        found = self._select(["data"], name=name)
        if not found:
            raise NotFound(f"the store has no params {name}; `raymem train` makes them, an import brings its bank's")
        blob: bytes = found[0]["data"]
        if name_of(blob) != name:
            raise Corrupt(f"params {name} have other bytes than their name says; train again or import them anew")
        return blob
