"""A cold store: the catalog, for each bank its journal, its snapshots and what is kept of its rows for models to attend
to, and files stored under their hash.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from crc32c import crc32c

from raymem.encode.calibration import Calibration
from raymem.errors import CalibrationNotFound, Corrupt, InvalidInput, NotFound
from raymem.logs import get_logger
from raymem.memory.learned import name_of
from raymem.storage.attended import Attended
from raymem.storage.catalog import Catalog, Entry, Line
from raymem.storage.cordon import Cordon
from raymem.storage.erasure.receipts import Receipts
from raymem.storage.journal.fork_journal import ForkJournal, ancestors
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.log import Log, OldLogs
from raymem.storage.lease_table import LeaseTable
from raymem.storage.partitions import Partitions
from raymem.storage.snapshots import Snapshot, Snapshots
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import BANK_TABLE, Tables, quote

__all__ = [
    "Calibrations",
    "Catalog",
    "ColdStore",
    "Entry",
    "Journal",
    "LeaseTable",
    "Params",
    "Partitions",
    "Snapshots",
]

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


class ColdStore:
    """Everything durable, in one local folder or object store; many processes may have it open at once."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.catalog = Catalog(tables)
        # whose folder was emptied, and filled again, is another store
        tables.pin("catalog")
        self.calibrations = Calibrations(tables)
        self.lease_table = LeaseTable(tables)
        self.draining = Cordon(tables)
        self.params = Params(tables)
        self.partitions = Partitions(tables, self.catalog)
        self.receipts = Receipts(tables)
        self._old_logs = OldLogs(tables)

    @classmethod
    def open(cls, uri: str, sync: Literal["disk", "none"] | None = None) -> ColdStore:
        """Open a store, making it on first use.

        Args:
            uri: a folder, or the address of an object store that LanceDB knows (s3://, gs://, az://).
            sync: "disk" syncs each commit before it is acknowledged, "none" does not; by default "disk" on a local
                path, and "none" on an object store, which does so itself.

        Raises:
            ConfigError: sync="disk" on an object store. StorageError: the store can't be reached or written.
        """
        return cls(Tables(uri, sync))

    @property
    def uri(self) -> str:
        """Where the store is."""
        return self.tables.uri

    @property
    def sync(self) -> Literal["disk", "none"]:
        """Whether commits are synced to disk."""
        return self.tables.sync

    def journal(self, entry: Entry, log: Log | None = None) -> Journal:
        """A bank's journal; nothing is read or written before it is used. Its owner may have a log."""
        kind = Journal if entry.whole().parent is None else ForkJournal
        return kind(self.tables, self.catalog, entry, self._old_logs, log)

    def attended(self, entry: Entry) -> Attended:
        """Keys and values of a bank's rows; nothing is read or written before they are used."""
        return Attended(self.tables, self.catalog, entry)

    def snapshots(self, entry: Entry) -> Snapshots:
        """A bank's snapshots; nothing is read or written before they are used."""
        return Snapshots(self.tables, entry, tagged=lambda: self._tagged(entry))

    def state(self, entry: Entry, upto: int | None = None) -> Snapshot | None:
        """The newest sound snapshot up to position `upto`; a fork without one of its own has those it came from."""
        found = self.snapshots(entry).latest(upto=upto)
        if found is not None or entry.parent is None:
            return found
        for parent, base in ancestors(self.catalog, entry):
            found = self.snapshots(parent).latest(upto=base if upto is None else min(base, upto))
            if found is not None:
                break
        return found

    def nonce(self) -> str:
        """What the store's creator wrote: processes that read different nonces don't see the same store."""
        return self.catalog.nonce()

    def remove(self, name: str, line: Line | None = None) -> None:
        """Remove a bank with its journal and snapshots; once its catalog row is gone, so is the bank.

        Nothing of it is read but the names of its tables: it goes whatever they hold.

        Raises:
            BankNotFound: there is no such bank. Conflict: it has forks, naming them. NotOwner: an owner has claimed it
            since `line`, its line in the catalog, was looked up.
        """
        line = line or self.catalog.line(name)
        self.catalog.drop(line)
        for table in line.tables:
            # what else a damaged line names is no table of a bank
            if BANK_TABLE.fullmatch(table):
                self.tables.drop(table)

    def _tagged(self, entry: Entry) -> list[int]:
        present = self.catalog.by_id(entry.id)
        return list(present.tags.values()) if present else []
