"""A small table that many processes change at once, each change a compare-and-swap on its latest version."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import pyarrow as pa

from raymem.errors import ConfigError, Conflict, Corrupt, RaymemError, StorageError
from raymem.retry import attempts
from raymem.storage.tables.disk import reading, writing
from raymem.storage.tables.tables import Tables, quote

_ATTEMPTS = 12
# a change that depends on what rows say takes longer than one that does not, and is cut short by each that crosses it
SWAP_ATTEMPTS = 48
_COMPACT_EVERY = 16
# longer than any process takes from opening the table to the end of its read
_KEEP_VERSIONS = timedelta(minutes=5)

T = TypeVar("T")
Rows = list[dict[str, Any]]
# finds rows as they were at one moment
Find = Callable[[str], Rows]
# rows to write, and ids of those to drop
Change = tuple[Rows, list[str]]


class CasTable:
    """A table without an owner: every change is repeated when another process was first, and durable at its end.

    Args:
        tables: the store's.
        name: of the table.
        what: the table in errors, for example "the catalog".
        keep: how long versions that were overwritten stay readable.
        later: whether it is made with its first rows, and has none until then.
    """

    def __init__(
        self, tables: Tables, name: str, what: str, keep: timedelta = _KEEP_VERSIONS, *, later: bool = False
    ) -> None:
        self._tables = tables
        self._name = name
        self._what = what
        self._keep = keep
        self._later = later
        self._sync = tables.folder_sync(name)
        self._turn = threading.Lock()

    def create(self, rows: pa.Table) -> None:
        """Make the table with these rows, durably, unless it is there already.

        Raises:
            ConfigError: it lacks columns that these rows have.
        """
        table = self._tables.share(self._name, rows)
        self._make_durable()
        if missing := set(rows.schema.names) - set(table.schema.names):
            raise ConfigError(
                f"an earlier raymem wrote the store at {self._tables.uri}: {self._what} has no "
                f"{', '.join(sorted(missing))}; export its banks with that version, and import them into a new store"
            )

    def rows(self, where: str = "true") -> Rows:
        """The rows that match, as of now."""
        try:
            with reading(f"read {self._what}"):
                found: Rows = self._tables.open(self._name).search().where(where).to_arrow().to_pylist()
        except Corrupt as error:
            if not (self._later and error.details.get("missing")):
                raise
            return []
        return found

    def change(self, what: str, change: Callable[[Any], T], count: int = _ATTEMPTS) -> T:
        """Run a change of one commit, on a handle on the latest version, until no other process is in its way.

        Raises:
            Overloaded: the others never ended.
        """
        # threads of one process wait for each other: their commits would only cross
        with self._turn:
            for _ in attempts(count, f"{what}: {self._what} is too busy", retry_after_s=0.5):
                try:
                    with writing(what):
                        table = self._tables.open(self._name)
                        result = change(table)
                    break
                except Conflict:
                    continue
            self._make_durable()
            if table.version % _COMPACT_EVERY == 0:
                self._compact(table)
        return result

    def swap(self, what: str, pivot: str, counter: str, decide: Callable[[Find], Change]) -> None:
        """Change several rows, known by their `id`, depending on what others say: all of it holds at one moment.

        Each such commit is based on the version in which it looked, and rewrites the pivot: of two that cross, the
        later fails (measured: also when they touch no other row in common) and decides again.

        Args:
            what: the change in errors.
            pivot: the condition that finds the row which all changes that may not cross rewrite.
            counter: its column that counts them.
            decide: what to change, from rows as they are; what it raises is raised, and nothing changed.
        """

        def once(table: Any) -> RaymemError | None:
            dataset = table.to_lance()

            def find(where: str) -> Rows:
                with reading(f"read {self._what}"):
                    rows: Rows = dataset.to_table(filter=where).to_pylist()
                return rows

            try:
                rows, dropped = decide(find)
            except RaymemError as error:
                # what the rows say is no reason to look again
                return error
            turned = {row["id"]: row | {counter: row[counter] + 1} for row in find(pivot)}
            changed = turned | {row["id"]: row for row in rows}
            merge = dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            if dropped:
                merge = merge.when_not_matched_by_source_delete(f"id IN ({', '.join(map(quote, dropped))})")
            merge.conflict_retries(0).execute(pa.Table.from_pylist(list(changed.values()), schema=dataset.schema))
            table.checkout_latest()
            return None

        refused = self.change(what, once, SWAP_ATTEMPTS)
        if refused is not None:
            raise refused

    def _make_durable(self) -> None:
        if self._sync:
            with writing(f"sync {self._what}"):
                self._sync.sync()

    def _compact(self, table: Any) -> None:
        try:
            with writing(f"compact {self._what}"):
                table.optimize(cleanup_older_than=self._keep)
        except (Conflict, StorageError):
            # another process changed the table meanwhile: the next multiple comes soon
            return
        self._make_durable()
