"""A small table that many processes change at once, each change a compare-and-swap on its latest version."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import pyarrow as pa

from raymem.cold.failures import reading, writing
from raymem.cold.tables import Tables
from raymem.errors import Conflict, Overloaded, StorageError

ATTEMPTS = 12
_COMPACT_EVERY = 128
# longer than any process takes from opening the table to the end of its read
_KEEP_VERSIONS = timedelta(minutes=5)

T = TypeVar("T")


class SharedTable:
    """A table without an owner: every change is repeated when another process was first, and durable at its end.

    Args:
        tables: the store's.
        name: of the table.
        what: the table in errors, for example "the catalog".
        keep: how long versions that were overwritten stay readable.
    """

    def __init__(self, tables: Tables, name: str, what: str, keep: timedelta = _KEEP_VERSIONS) -> None:
        self._tables = tables
        self._name = name
        self._what = what
        self._keep = keep
        self._sync = tables.folder_sync(name)

    def create(self, rows: pa.Table) -> None:
        """Make the table with these rows, durably, unless it is there already."""
        self._tables.create(self._name, rows)
        self._make_durable()

    def open(self) -> Any:
        """A handle on the latest version."""
        return self._tables.open(self._name)

    def rows(self, where: str = "true") -> list[dict[str, Any]]:
        """The rows that match, as of now."""
        with reading(f"read {self._what}"):
            found: list[dict[str, Any]] = self.open().search().where(where).to_arrow().to_pylist()
        return found

    def change(self, what: str, change: Callable[[], T], attempts: int = ATTEMPTS) -> T:
        """Run a change of one commit until no other process is in its way.

        Raises:
            Overloaded: the others never ended.
        """
        for attempt in range(attempts):
            try:
                with writing(what):
                    result = change()
                break
            except Conflict:
                time.sleep(random.uniform(0, 0.01 * 2 ** min(attempt, 5)))
        else:
            raise Overloaded(f"{what}: {self._what} is too busy; try again", retry_after_s=0.5)
        self._make_durable()
        self._compact()
        return result

    def _make_durable(self) -> None:
        if self._sync:
            with writing(f"sync {self._what}"):
                self._sync.sync()

    def _compact(self) -> None:
        table = self.open()
        if table.version % _COMPACT_EVERY:
            return
        try:
            with writing(f"compact {self._what}"):
                table.optimize(cleanup_older_than=self._keep)
        except (Conflict, StorageError):
            # somebody changed the table meanwhile: the next multiple comes soon
            return
        self._make_durable()
