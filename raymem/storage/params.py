"""Learned weights: safetensors files, stored under the hash that a bank's spec names them by, never changed."""

from __future__ import annotations

import time

import pyarrow as pa

from raymem.errors import Corrupt, NotFound
from raymem.memory.learned import name_of
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables, quote

_TABLE = "params"
_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("created", pa.float64(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)


class Params:
    """Files of weights by name, which is `sha256:` and the hash of their bytes."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._sync = tables.folder_sync(_TABLE)
        tables.share(_TABLE, _SCHEMA.empty_table())

    def put(self, kind: str, blob: bytes) -> str:
        """Store a file and return its name; one that is there already stays as it is."""
        name = name_of(blob)
        row = {"name": name, "kind": kind, "created": time.time(), "data": blob}
        with writing(f"store params {name}"):
            merge = self._tables.open(_TABLE).merge_insert("name").when_not_matched_insert_all()
            merge.execute(pa.Table.from_pylist([row], schema=_SCHEMA))
            if self._sync:
                self._sync.sync()
        return name

    def get(self, name: str) -> bytes:
        """The file of that name.

        Raises:
            NotFound: there is none. Corrupt: its bytes don't have that hash.
        """
        with reading(f"read params {name}"):
            found = self._tables.open(_TABLE).search().where(f"name = {quote(name)}").to_arrow().to_pylist()
        if not found:
            raise NotFound(f"the store has no params {name}; `raymem train` makes them, an import brings its bank's")
        blob: bytes = found[0]["data"]
        if name_of(blob) != name:
            raise Corrupt(f"params {name} have other bytes than their name says; train again or import them anew")
        return blob
