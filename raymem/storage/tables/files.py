"""The files under a cold store's tables, as they lie there: what LanceDB's own view of a table does not show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from lance.file import LanceFileReader
from pyarrow import fs

from raymem.storage.tables.disk import reading
from raymem.storage.tables.tables import Tables

_SUFFIX = ".lance"


@dataclass(frozen=True)
class File:
    """One file of a table: its path in the store, its bytes, and when it was written, in seconds since the epoch."""

    table: str
    path: str
    bytes: int
    written: float

    @property
    def holds_rows(self) -> bool:
        """Whether it is a data file, named by a version of the table or by none."""
        return self.path.endswith(_SUFFIX)


class Files:
    """Reads a cold store's folder, or its prefix in an object store."""

    def __init__(self, tables: Tables) -> None:
        self._uri = tables.base
        with reading(f"look into {tables.uri}"):
            self._fs, self._root = _file_system(tables.base)

    def tables(self) -> list[str]:
        """Names of the folders there, whether or not a table can be opened in them."""
        with reading(f"list {self._uri}"):
            found = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        names = [info.base_name for info in found if info.type == fs.FileType.Directory]
        return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))

    def of(self, table: str) -> list[File]:
        """Every file of a table, of all its versions and of none."""
        folder = f"{self._root}/{table}{_SUFFIX}"
        with reading(f"list {table} in {self._uri}"):
            found = self._fs.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        return [
            File(table, info.path, info.size, info.mtime.timestamp() if info.mtime else 0.0)
            for info in found
            if info.type == fs.FileType.File
        ]

    def rows(self, file: File, batch_rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """What a data file holds, decoded, some rows at a time.

        Raises:
            Corrupt: it can't be.
        """
        with reading(f"decode {file.path}"):
            reader = LanceFileReader(self._uri + file.path.removeprefix(self._root))
            count = reader.num_rows()
        # asked for all of them at once it reads far ahead: 340 MB of memory for a state of 300
        for start in range(0, count, batch_rows):
            with reading(f"decode {file.path}"):
                table = reader.read_range(start, min(batch_rows, count - start)).to_table().combine_chunks()
            yield from table.to_batches()


def _file_system(uri: str) -> tuple[Any, str]:
    if not uri.startswith("s3://"):
        found: tuple[Any, str] = fs.FileSystem.from_uri(uri if "://" in uri else f"file://{uri}")
        return found
    # the variables by which LanceDB finds a server of one's own
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    scheme = "http" if endpoint.startswith("http://") else "https"
    system = fs.S3FileSystem(
        endpoint_override=endpoint or None,
        scheme=scheme,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    )
    return system, uri.removeprefix("s3://").rstrip("/")
