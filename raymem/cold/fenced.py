"""A LanceDB table with one writer, whom the next writer can fence off for good."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pyarrow as pa
from lance import LanceOperation

from raymem.cold.failures import reading, writing
from raymem.cold.tables import Tables
from raymem.errors import Conflict, Corrupt, NotOwner

# readers that opened a version this long ago may still read it to the end without looking again
_KEEP_VERSIONS = timedelta(seconds=10)
# a large table has larger fragments, not more of them
_FRAGMENTS = 512
# how far back a look goes: each take-over has looked before, and brought back what was missing then
_RESTORES = 16


class FencedTable:
    """The writing side of one table: a handle that is never refreshed, so that a later owner's fence stops it.

    After an error the handle is gone (`ready` is False) and only `fence` or `reopen` give a new one. `fragments` counts
    the table's fragments, `loose` those that compaction would merge, as far as this writer knows.

    Args:
        tables: the cold store's.
        name: the table.
        what: whose it is, for error texts: "bank lab/a".
        fragment_rows: rows that a compacted fragment should have.
    """

    def __init__(self, tables: Tables, name: str, what: str, fragment_rows: int) -> None:
        self.name = name
        self.what = what
        self.commits = 0
        self.compactions = 0
        self.fragments = 0
        self.loose = 0
        self.syncs = 0
        self.sync_s = 0.0
        self._tables = tables
        self._fragment_rows = fragment_rows
        self._sync = tables.folder_sync(name)
        self._handle: Any = None
        self._version = 0
        # what versions did, since the last fence: two looks at the same ones would cost as much as the fence
        self._operations: dict[int, Any] = {}
        self._dataset: Any = None

    @property
    def ready(self) -> bool:
        """Whether there is a handle to write with."""
        return self._handle is not None

    def open(self) -> Any:
        """The latest version, for reading."""
        return self._tables.open(self.name)

    def create(self, schema: pa.Schema) -> None:
        """Make the table under a name that nobody else uses, and be its first writer."""
        handle = self._tables.create(self.name, schema.empty_table())
        self._make_durable()
        self._keep(handle)

    def fence(self) -> None:
        """Become the only writer: handles that were opened before can't commit any more."""
        self._handle = None
        self._operations.clear()
        if self._sync:
            with writing(f"fence {self.what}"):
                self._sync.trust()
        handle = self.open()
        self._take_over(handle)
        self._make_durable()
        self._count(handle)
        self._keep(handle)

    def reopen(self) -> bool:
        """Go on after an error without a fence of one's own; say whether an append that failed is there all the same.

        Right only in a table that nobody but this writer and those who fence it off ever change.

        Raises:
            NotOwner: a later owner has fenced.
        """
        handle = self.open()
        commits = [self._operation(version) for version in range(self._version + 1, handle.version + 1)]
        # one that is gone was followed by others, and none of these are ours
        if any(commit is None or isinstance(commit, LanceOperation.Restore) for commit in commits):
            raise self._fenced()
        self._make_durable()
        # a handle that is kept says that the answer was given: whatever can fail comes before
        self._count(handle)
        self._keep(handle)
        return any(isinstance(commit, LanceOperation.Append) for commit in commits)

    def confirm(self) -> None:
        """After a read that much depends on: make sure that it saw all that was committed here.

        A fence that comes late, whose owner was killed in it, hides commits until the next fence brings them back.

        Raises:
            NotOwner: it may not have seen all, and there is no handle any more.
        """
        latest = self.open().version
        if self._content(latest)[1] != latest:
            self._handle = None
            raise NotOwner(f"a take-over of {self.what} was cut short and hides rows: attach it again, they come back")

    def add(self, rows: pa.Table) -> None:
        """Commit rows, all or none, durable when it returns.

        Raises:
            NotOwner: a later owner has fenced. StorageError: they may be there or not.
        """
        self._commit("append to", lambda handle: handle.add(rows))
        self.fragments += 1
        self.loose += 1

    def delete(self, where: str) -> None:
        """Delete rows; errors as those of `add`."""
        self._commit("delete from", lambda handle: handle.delete(where))
        self._count(self._handle)

    def compact(self, *, renew: bool, keep: timedelta | None = None) -> None:
        """Merge small fragments and drop what only old versions need.

        Args:
            keep: for how long versions that were overwritten stay readable.
            renew: the handles of earlier owners may still be about. Dropping the version that holds the fence would let
                them append again (measured): commit a new one first.

        Raises:
            NotOwner: a later owner has fenced. StorageError: nothing is lost.
        """
        handle, self._handle = self._handle, None
        try:
            self._compact(handle, renew, _KEEP_VERSIONS if keep is None else keep)
        except Conflict as error:
            raise self._fenced() from error
        self._count(handle)
        self._keep(handle)
        self.compactions += 1

    def close(self) -> None:
        """Give the handle up."""
        self._handle = None

    def _commit(self, what: str, change: Callable[[Any], Any]) -> None:
        handle, self._handle = self._handle, None
        try:
            with writing(f"{what} {self.what}"):
                change(handle)
        except Conflict as error:
            raise self._fenced() from error
        if handle.version != self._version + 1:
            raise self._fenced()
        self._make_durable()
        self._keep(handle)
        self.commits += 1

    def _keep(self, handle: Any) -> None:
        self._handle, self._version = handle, handle.version

    def _count(self, handle: Any) -> None:
        with reading(f"count the fragments of {self.what}"):
            rows = [fragment.metadata.physical_rows for fragment in handle.to_lance().get_fragments()]
        self.fragments = len(rows)
        self.loose = sum(count < self._target_rows(sum(rows)) for count in rows)

    def _target_rows(self, rows: int) -> int:
        return max(self._fragment_rows, rows // _FRAGMENTS)

    def _take_over(self, handle: Any) -> None:
        """Commit a restore: whatever is based on an older version conflicts with it."""
        looked = handle.version
        self._restore(handle, self._content(looked)[1])
        while self._content(handle.version)[0] > looked:
            # something was committed between our look and our restore, which has just undone it: bring it back
            looked = handle.version
            self._restore(handle, self._content(looked)[1])

    def _content(self, latest: int) -> tuple[int, int]:
        """The version that holds what the table should, and one to restore it from: the latest if that has the same.

        It is the newest that is no restore, or the oldest one left. A restore is never meant to change anything, but
        one that comes late undoes what was committed since its look, and who made it may die before bringing it back.
        """
        version, operation = latest, self._operation(latest)
        while isinstance(operation, LanceOperation.Restore) and latest - version < _RESTORES:
            before = self._operation(version - 1)
            if before is None:
                break
            version, operation = version - 1, before
        found = self._restored(latest, version)
        same = found == version or self._restored(found) == self._restored(version)
        return version, latest if same else version

    def _restored(self, version: int, down_to: int = 0) -> int:
        """The commit that a version restored, by whatever detours, or the first one met that is not after `down_to`."""
        while version > down_to and isinstance(found := self._operation(version), LanceOperation.Restore):
            version = found.version
        return version

    def _operation(self, version: int) -> Any:
        """What a version did to the table, or None if it has been cleaned up."""
        if version not in self._operations:
            if self._dataset is None:
                handle = self.open()
                with reading(f"open {self.what}"):
                    self._dataset = handle.to_lance()
            try:
                with reading(f"read version {version} of {self.what}"):
                    found = self._dataset.read_transaction(version)
            except Corrupt:
                return None
            if found is None:
                return None
            self._operations[version] = found.operation
        return self._operations[version]

    def _restore(self, handle: Any, version: int) -> None:
        with writing(f"fence {self.what}"):
            handle.restore(version)

    def _compact(self, handle: Any, renew: bool, keep: timedelta) -> None:
        with writing(f"compact {self.what}"):
            dataset = handle.to_lance()
            target = self._target_rows(dataset.count_rows())
            # what was deleted must go from the files too
            dataset.optimize.compact_files(target_rows_per_fragment=target, materialize_deletions_threshold=0.0)
        # the new files must be on disk before the old ones go
        self._make_durable()
        if renew:
            self._restore(handle, dataset.version)
            if handle.version != dataset.version + 1:
                self._restore(handle, self._content(handle.version)[1])
                raise self._fenced()
        else:
            handle.checkout_latest()
            if handle.version != dataset.version:
                raise self._fenced()
        # an error from here on leaves no older version to look at: see `reopen`
        self._version = handle.version
        # from this version on all stays: with a fence that has come meanwhile, and with what that one may bring back
        with writing(f"clean up {self.what}"):
            handle.to_lance().cleanup_old_versions(older_than=keep)
        self._make_durable()

    def _make_durable(self) -> None:
        if self._sync:
            began = time.perf_counter()
            with writing(f"sync {self.what}"):
                self._sync.sync()
            self.syncs += 1
            self.sync_s += time.perf_counter() - began

    def _fenced(self) -> NotOwner:
        return NotOwner(f"a later owner has taken over {self.what}; nothing was acknowledged, look up who owns it")
