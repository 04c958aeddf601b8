"""Where tables are: names, opening, creating and dropping them, and filters that can't be broken out of."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lancedb
import pyarrow as pa

from raymem.errors import ConfigError, Conflict, Corrupt, RaymemError, StorageError
from raymem.storage.tables.disk import Folder, FolderLock, FolderSync, is_locked, reading, set_aside_torn, writing

Sync = Literal["disk", "none"]
BANK_TABLE = re.compile(r"(?P<kind>journal|snapshots|attended)-(?P<id>[0-9a-f]{32})(?:-(?P<generation>\d+))?")
# what LanceDB remembers of tables: without a limit it keeps something of every version, 40 kB of each write, for ever
_INDEX_CACHE_BYTES, _METADATA_CACHE_BYTES = 4 * 2**20, 16 * 2**20
_DROPS = 8


class Tables:
    """A cold store's tables: a folder or an object store, and whether commits are synced to disk.

    Every `open` sees the latest version; a handle stays at the version that it opened or wrote, because nothing here
    sets a read consistency interval.
    """

    def __init__(self, uri: str, sync: Sync | None) -> None:
        local = "://" not in uri or uri.startswith("file://")
        if sync == "disk" and not local:
            raise ConfigError(f'sync="disk" needs a local path, and {uri} is an object store: leave sync out there')
        if local and "?" in uri:
            raise ConfigError(f"LanceDB reads no folder with a question mark in its path, as {uri} has: rename it")
        self.uri = str(Path(uri.removeprefix("file://")).expanduser().absolute()) if local else uri
        self.sync: Sync = sync or ("disk" if local else "none")
        # what must stay where it is; nothing else can be in the place of a prefix in an object store
        self.place: Folder | None = None
        with writing(f"open the cold store at {self.uri}"):
            if local:
                os.makedirs(self.uri, exist_ok=True)
                self.place = Folder(self.uri)
            self.base = self.place.base if self.place else self.uri
            self._connection = lancedb.connect(self.base, session=_session())
            if self.place:
                # LanceDB's handles on tables keep the connection
                self.place.close_with(self._connection)

    def pin(self, name: str) -> None:
        """From now on, `require` that a table's folder stays the one that it is."""
        if self.place:
            with reading(f"open {name} in {self.uri}"):
                self.place.pin(f"{name}.lance")

    def look(self) -> None:
        """Raise StorageError, or Corrupt, unless what is there can be listed; nothing is made."""
        with reading(f"list {self.uri}"):
            self._connection.list_tables(limit=1)

    def open(self, name: str) -> Any:
        """A handle on the table's latest version.

        Raises:
            Corrupt: the table is gone or its metadata can't be read.
        """
        was_torn = False
        while True:
            if self.place:
                self.place.require()
            try:
                with reading(f"open {name} in {self.uri}"):
                    return self._connection.open_table(name)
            except Corrupt:
                folder = self.folder(name)
                if was_torn or folder is None or self.sync != "disk" or not set_aside_torn(folder):
                    raise
                was_torn = True

    def create(self, name: str, rows: pa.Table, file_format: str | None = None) -> Any:
        """Create a table holding `rows`, in one commit, or open the one that is there; see `share`.

        `file_format` is the version of Lance's data files, by default LanceDB's own choice.
        """
        options = {"new_table_data_storage_version": file_format} if file_format else None
        folder = self.folder(name)
        if folder is not None and self.sync == "disk":
            set_aside_torn(folder)
        self._require()
        with writing(f"create {name} in {self.uri}"):
            return self._connection.create_table(name, rows, exist_ok=True, storage_options=options)

    def share(self, name: str, rows: pa.Table) -> Any:
        """As `create`, for a table that several processes may make at once: one does, the others open what it made.

        Of two that create a table together LanceDB lets the later overwrite it, with what was added since (measured: 22
        of 150 such races lost a commit that had succeeded). In a folder they take turns; an object store has no turns.
        """
        try:
            return self.open(name)
        except Corrupt as error:
            if not error.details.get("missing"):
                raise
        with self._turn():
            try:
                return self.create(name, rows)
            except Conflict:
                return self.open(name)

    def fill(self, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
        """Create a table from a stream of batches in one commit, durable when it returns; after an error there is none.

        Raises:
            StorageError, or what `batches` raises.
        """
        source = _Source(batches)
        self._require()
        try:
            with writing(f"create {name} in {self.uri}"):
                self._connection.create_table(name, pa.RecordBatchReader.from_batches(schema, source))
                if sync := self.folder_sync(name):
                    sync.sync()
        except RaymemError as error:
            self.drop(name)
            raise source.error or error from None

    def drop(self, name: str) -> None:
        """Delete a table and its files; nothing happens if there is none."""
        for _ in range(_DROPS):
            self._require()
            try:
                with writing(f"drop {name} in {self.uri}"):
                    self._connection.drop_table(name, ignore_missing=True)
                return
            except StorageError as error:
                # a late writer put a file into a folder that was just emptied
                if error.details.get("reason") != os.strerror(errno.ENOTEMPTY):
                    raise
                last = error
        raise last

    def folder_sync(self, name: str) -> FolderSync | None:
        """What makes this table's commits durable, or None where the store does that itself or `sync` is "none"."""
        folder = self.folder(name)
        return None if folder is None or self.sync == "none" else FolderSync(folder)

    def folder(self, name: str) -> Path | None:
        """Where a table's files are, or None in an object store."""
        return Path(self.base) / f"{name}.lance" if self.place else None

    def lock(self, name: str) -> FolderLock | None:
        """Lock a table for as long as this process lives, where others can see that it does: in a folder.

        A copy of the folder isn't locked. Releasing it needs no room on the disk.
        """
        folder = self.folder(name)
        return None if folder is None else FolderLock(folder)

    def is_locked(self, name: str) -> bool | None:
        """Whether a process has locked a table; None in an object store, where none can."""
        folder = self.folder(name)
        return None if folder is None else is_locked(folder)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self.place:
            yield
            return
        handle = os.open(self.base, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _require(self) -> None:
        if self.place:
            self.place.require()


def _session() -> lancedb.Session:
    return lancedb.Session(index_cache_size_bytes=_INDEX_CACHE_BYTES, metadata_cache_size_bytes=_METADATA_CACHE_BYTES)


class _Source:
    """Batches on their way through LanceDB, which forgets what kind of error they raised."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = batches
        self.error: RaymemError | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._batches
        except RaymemError as error:
            self.error = error
            raise


def in_memory(parts: Iterable[pa.Table]) -> Any:
    """A table that is nowhere on disk, for conditions on rows that are in no table of their own; None without parts."""
    tables = list(parts)
    return lancedb.connect("memory://").create_table("rows", pa.concat_tables(tables)) if tables else None


def journal_table(bank_id: str, generation: int = 0) -> str:
    """The name of the table that holds a bank's journal; a rewritten journal is a table of its own."""
    return f"journal-{bank_id}-{generation}" if generation else f"journal-{bank_id}"


def log_table(incarnation: str) -> str:
    """The name of the table in which a host incarnation commits small groups of rows of all its banks."""
    return f"log-{incarnation}"


def snapshot_table(bank_id: str, generation: int = 0) -> str:
    """The name of the table that holds a bank's snapshots: a journal that was rewritten has others."""
    return f"snapshots-{bank_id}-{generation}" if generation else f"snapshots-{bank_id}"


def attended_table(bank_id: str, generation: int = 0) -> str:
    """The name of the table that holds keys and values of a bank's rows: a journal that was rewritten has others."""
    return f"attended-{bank_id}-{generation}" if generation else f"attended-{bank_id}"


def quote(text: str) -> str:
    """`text` as an SQL string literal: the only way in which a value gets into a filter."""
    return "'" + text.replace("'", "''") + "'"
