"""A LanceDB table with one writer, whom the next writer can fence off for good."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from typing import Any

import pyarrow as pa
from lance import LanceOperation

from raymem.errors import Conflict, Corrupt, NotOwner
from raymem.retry import attempts
from raymem.storage.tables.cas_table import SWAP_ATTEMPTS
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables

# readers that opened a version this long ago may still read it to the end without looking again
_KEEP_VERSIONS = timedelta(seconds=10)
# a large table has larger fragments, not more of them
_FRAGMENTS = 512
# what a writer commits that isn't a fence
_WRITES = (LanceOperation.Append, LanceOperation.Delete, LanceOperation.Rewrite)


class WriterState(Enum):
    """What a writer knows of its table; the classes that have one say what holds in each."""

    READY = "ready"
    IN_DOUBT = "in doubt"
    LOST = "lost"


class SingleWriterTable:
    """The writing side of one table: a handle that is never refreshed, so that a later owner's fence stops it.

    Its `state`:

    - READY: the handle is at the last version of this writer, which is durable, and nothing is under way. All later
      versions are other writers'.
    - IN_DOUBT: there is no handle, because nothing was opened yet, or a change is under way or failed. It may have
      been committed after the last known version. `fence` and `reopen` lead to READY.
    - LOST: there is no handle, because a later owner has fenced. Only `fence` leads out, for an owner that the catalog
      still names.

    `fragments` counts the table's fragments, `loose` those that compaction would merge, as far as this writer knows.

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
        self.state = WriterState.IN_DOUBT
        self._handle: Any = None
        self._version = 0

    def create(self, schema: pa.Schema) -> None:
        """Make the table under a name that no other writer uses, and be its first writer."""
        handle = self._tables.create(self.name, schema.empty_table())
        self._make_durable()
        self._keep(handle)

    def fence(self) -> None:
        """Become the only writer: handles that were opened before can't commit any more.

        Raises:
            Overloaded: others were always first. StorageError: try again.
        """
        self._handle, self.state = None, WriterState.IN_DOUBT
        if self._sync:
            with writing(f"fence {self.what}"):
                self._sync.trust()
        for _ in attempts(SWAP_ATTEMPTS, f"{self.what} is written to, or taken over, all the time", retry_after_s=0.5):
            handle = self._tables.open(self.name)
            dataset = self._dataset(handle)
            if self._bar(handle, dataset):
                break
        self._make_durable()
        self._count(dataset)
        self._keep(handle)

    def reopen(self) -> int:
        """Go on after an error without a fence of one's own; say how many appends that failed are there all the same.

        Right only in a table that this writer alone changes, but for the fences of later owners.

        Raises:
            NotOwner: a later owner has fenced.
        """
        if self.state is WriterState.LOST:
            raise self._lost()
        handle = self._tables.open(self.name)
        dataset = self._dataset(handle)
        commits = self._commits(dataset, self._version, dataset.version + 1)
        if not all(isinstance(commit, _WRITES) or _reserves(commit) for commit in commits):
            raise self._lost()
        self._make_durable()
        # READY says that the answer was given: all that can fail comes before
        self._count(dataset)
        self._keep(handle)
        return sum(isinstance(commit, LanceOperation.Append) for commit in commits)

    def add(self, rows: pa.Table) -> None:
        """Commit rows, all or none, durable when it returns.

        Raises:
            NotOwner: a later owner has fenced. StorageError: they may be there or not.
        """
        with self._committing("append to") as handle:
            handle.add(rows)
        self.fragments += 1
        self.loose += 1

    def delete(self, where: str) -> None:
        """Delete rows; errors as those of `add`."""
        with self._committing("delete from") as handle:
            handle.delete(where)
        self._count(self._dataset(self._handle))

    def compact(self, *, renew: bool, keep: timedelta | None = None) -> None:
        """Merge small fragments and drop what only old versions need.

        Args:
            keep: for how long versions that were overwritten stay readable.
            renew: the handles of earlier owners may still be about. Dropping the version that holds the fence would let
                them append again (measured): commit a new one first.

        Raises:
            NotOwner: a later owner has fenced. StorageError: nothing is lost.
        """
        handle, self._handle, self.state = self._handle, None, WriterState.IN_DOUBT
        try:
            dataset = self._compact(handle, renew, _KEEP_VERSIONS if keep is None else keep)
        except Conflict as error:
            raise self._lost() from error
        self._count(dataset)
        self._keep(handle)
        self.compactions += 1

    def close(self) -> None:
        """Give the handle up."""
        self._handle, self.state = None, WriterState.IN_DOUBT

    @contextmanager
    def _committing(self, what: str) -> Iterator[Any]:
        """Inside, one change is made with the handle; afterwards it is durable, and no other writer was in between."""
        handle, self._handle, self.state = self._handle, None, WriterState.IN_DOUBT
        if self._tables.place:
            self._tables.place.require()
        try:
            with writing(f"{what} {self.what}"):
                yield handle
        except Conflict as error:
            raise self._lost() from error
        if handle.version != self._version + 1 and not self._alone(handle, self._version, handle.version):
            raise self._lost()
        self._make_durable()
        if self._tables.place:
            self._tables.place.require()
        self._handle, self._version, self.state = handle, handle.version, WriterState.READY
        self.commits += 1

    def _keep(self, handle: Any) -> None:
        self._handle, self._version, self.state = handle, handle.version, WriterState.READY

    def _dataset(self, handle: Any) -> Any:
        # not `reading`: a version that was opened, and cleaned up since then, is no damage
        with writing(f"open {self.what}"):
            return handle.to_lance()

    def _count(self, dataset: Any) -> None:
        rows = [fragment.metadata.physical_rows for fragment in dataset.get_fragments()]
        self.fragments = len(rows)
        target = max(self._fragment_rows, sum(rows) // _FRAGMENTS)
        self.loose = sum(count < target for count in rows)

    def _bar(self, handle: Any, dataset: Any) -> bool:
        """Commit a version with all that the dataset's has, if that is the latest, and move the handle there.

        To LanceDB that is a merge of no columns. It is refused if anything was committed since, so it undoes nothing,
        and whatever is based on an older version is refused after it.

        Returns:
            Whether it was committed, and still is the latest version.
        """
        same = LanceOperation.Merge([each.metadata for each in dataset.get_fragments()], dataset.lance_schema)
        try:
            with writing(f"fence {self.what}"):
                barred = dataset.commit(dataset, same, read_version=dataset.version)
        except Conflict:
            return False
        return self._is_latest(handle, barred.version)

    def _is_latest(self, handle: Any, version: int) -> bool:
        """Move a handle to the latest version; say whether that is this one, or as good as this one."""
        with reading(f"open {self.what}"):
            handle.checkout_latest()
        return handle.version == version or self._alone(handle, version, handle.version + 1)

    def _alone(self, handle: Any, after: int, before: int) -> bool:
        """Whether no other writer has changed the table between two versions."""
        return all(map(_reserves, self._commits(self._dataset(handle), after, before)))

    def _commits(self, dataset: Any, after: int, before: int) -> list[Any]:
        """What was committed between two versions; None where that can't be told.

        Raises:
            NotOwner: some of that was cleaned up, so others wrote after it, and none of it is this writer's.
        """
        try:
            with reading(f"read what was done to {self.what}"):
                done = [dataset.read_transaction(each) for each in range(after + 1, before)]
        except Corrupt as error:
            raise self._lost() from error
        return [each and each.operation for each in done]

    def _compact(self, handle: Any, renew: bool, keep: timedelta) -> Any:
        with writing(f"compact {self.what}"):
            dataset = handle.to_lance()
            target = max(self._fragment_rows, dataset.count_rows() // _FRAGMENTS)
            # what was deleted must go from the files too
            dataset.optimize.compact_files(target_rows_per_fragment=target, materialize_deletions_threshold=0.0)
        # the new files must be on disk before the old ones go
        self._make_durable()
        alone = self._bar(handle, dataset) if renew else self._is_latest(handle, dataset.version)
        if not alone:
            raise self._lost()
        # an error from here on leaves no older version to look at: see `reopen`
        self._version = handle.version
        # from this version on all stays, also a fence that has come meanwhile
        with writing(f"clean up {self.what}"):
            handle.to_lance().cleanup_old_versions(older_than=keep)
        self._make_durable()
        return dataset

    def _make_durable(self) -> None:
        if self._sync:
            began = time.perf_counter()
            with writing(f"sync {self.what}"):
                self._sync.sync()
            self.syncs += 1
            self.sync_s += time.perf_counter() - began

    def _lost(self) -> NotOwner:
        self._handle, self.state = None, WriterState.LOST
        return NotOwner(f"a later owner has taken over {self.what}; nothing was acknowledged, look up who owns it")


def _reserves(commit: Any) -> bool:
    """Whether a commit only reserves numbers for fragments, which has no class of its own.

    The compaction of an earlier owner, refused after a fence, leaves one.
    """
    return type(commit) is LanceOperation.BaseOperation
