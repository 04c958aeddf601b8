"""A cold store: the catalog, and for each bank its journal and its snapshots."""

from __future__ import annotations

from typing import Literal

from raymem.storage.catalog import Catalog, Entry
from raymem.storage.content_store import Calibrations, Params
from raymem.storage.cordon import Cordon
from raymem.storage.erasure.receipts import Receipts
from raymem.storage.journal.fork_journal import ForkJournal, ancestors
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.log import Log, OldLogs
from raymem.storage.lease_table import LeaseTable
from raymem.storage.partitions import Partitions
from raymem.storage.snapshots import Snapshot, Snapshots
from raymem.storage.tables.tables import BANK_TABLE, Tables

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

    def remove(self, name: str) -> None:
        """Remove a bank with its journal and snapshots; once its catalog row is gone, so is the bank.

        Nothing of it is read but the names of its tables: it goes whatever they hold.

        Raises:
            BankNotFound: there is no such bank. Conflict: it has forks, naming them.
        """
        line = self.catalog.line(name)
        self.catalog.drop(line)
        for table in line.tables:
            # what else a damaged line names is no table of a bank
            if BANK_TABLE.fullmatch(table):
                self.tables.drop(table)

    def _tagged(self, entry: Entry) -> list[int]:
        present = self.catalog.by_id(entry.id)
        return list(present.tags.values()) if present else []
