"""A cold store: the catalog, and for each bank its journal and its snapshots."""

from __future__ import annotations

from typing import Literal

from raymem.cold.calibrations import Calibrations
from raymem.cold.catalog import Catalog, Entry
from raymem.cold.incarnations import Incarnations
from raymem.cold.journal import Journal
from raymem.cold.snapshots import Snapshots
from raymem.cold.tables import Tables, journal_table, snapshot_table

__all__ = ["Calibrations", "Catalog", "ColdStore", "Entry", "Incarnations", "Journal", "Snapshots"]


class ColdStore:
    """Everything durable, in one local folder or object store; many processes may have it open at once."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.catalog = Catalog(tables)
        self.calibrations = Calibrations(tables)
        self.incarnations = Incarnations(tables)

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

    def journal(self, entry: Entry) -> Journal:
        """A bank's journal; nothing is read or written before it is used."""
        return Journal(self.tables, self.catalog, entry)

    def snapshots(self, entry: Entry) -> Snapshots:
        """A bank's snapshots; nothing is read or written before they are used."""
        return Snapshots(self.tables, entry)

    def nonce(self) -> str:
        """What the store's creator wrote: processes that read different nonces don't see the same store."""
        return self.catalog.nonce()

    def remove(self, name: str) -> None:
        """Remove a bank with its journal and snapshots; once its catalog row is gone, so is the bank.

        Raises:
            BankNotFound: there is no such bank.
        """
        entry = self.catalog.get(name)
        self.catalog.drop(entry)
        for table in (journal_table(entry.id, entry.generation), snapshot_table(entry.id)):
            self.tables.drop(table)
