"""Banks as they were: replicas at earlier positions, made when they are read and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from raymem.bank.replica import Replica
from raymem.errors import BankNotFound
from raymem.host.ownership import Locks
from raymem.storage.history import position_of
from raymem.storage.store import ColdStore, Entry

# a position of one writing of a bank's journal
_Key = tuple[str, int, int]


class Point(NamedTuple):
    """A bank at a position in its past; `nbytes` is about what its state takes there."""

    bank: Entry
    pos: int
    nbytes: int

    @property
    def key(self) -> _Key:
        """What it is kept under."""
        return self.bank.id, self.bank.generation, self.pos


class PointInTimeCache:
    """Read-only replicas of banks at positions in their past, the least lately used dropped first.

    Args:
        cold: the store.
        limit_bytes: what all of them may hold; one that alone holds more is made anew for each read.
        device: where their states live.
    """

    def __init__(self, cold: ColdStore, limit_bytes: int, device: str = "cpu") -> None:
        self._cold = cold
        self._limit = limit_bytes
        # when any was last read, by the monotonic clock
        self.used = 0.0
        self._device = device
        self._kept: OrderedDict[_Key, Replica] = OrderedDict()
        self._making: Locks[threading.Lock] = Locks(threading.Lock)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all states kept."""
        with self._lock:
            return sum(replica.nbytes for replica in self._kept.values())

    def find(self, bank: Entry, as_of: str | float, nbytes: int) -> Point:
        """Where a bank was at a tag or a time; its state takes `nbytes` now.

        Raises:
            TagNotFound: neither, naming the tags there are.
        """
        entry = self._cold.catalog.by_id(bank.id)
        if entry is None:
            raise BankNotFound(f"bank {bank.name!r} was removed")
        return Point(entry, position_of(self._cold, entry, as_of), nbytes)

    def needs(self, point: Point) -> int:
        """Bytes of all states once this one is among them."""
        if self._get(point.key) is not None:
            return self.nbytes
        return point.nbytes + min(self.nbytes, max(0, self._limit - point.nbytes))

    def at(self, point: Point) -> Replica:
        """The bank as it was there."""
        with self._making_of(point.key):
            found = self._get(point.key)
            if found is None:
                self._shrink(self._limit - point.nbytes)
                found = self._make(point.bank, point.pos)
            self._keep(point.key, found)
        return found

    def forget(self, id: str | None = None) -> None:
        """Drop what is kept of a bank, or of all."""
        with self._lock:
            for key in [key for key in self._kept if id in (None, key[0])]:
                del self._kept[key]

    def _make(self, entry: Entry, pos: int) -> Replica:
        replica = Replica(self._cold, entry, self._device)
        replica.recover(pos)
        return replica

    def _making_of(self, key: _Key) -> threading.Lock:
        with self._lock:
            return self._making[key]

    def _get(self, key: _Key) -> Replica | None:
        with self._lock:
            return self._kept.get(key)

    def _keep(self, key: _Key, replica: Replica) -> None:
        with self._lock:
            self._kept[key] = replica
            self._kept.move_to_end(key)
        self._shrink(self._limit)

    def _shrink(self, limit: int) -> None:
        with self._lock:
            total = sum(kept.nbytes for kept in self._kept.values())
            while self._kept and total > limit:
                _, oldest = self._kept.popitem(last=False)
                total -= oldest.nbytes
