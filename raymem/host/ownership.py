"""One incarnation of a host: the lease under which it claims banks, and the log that it commits to."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from raymem.bank.owner import GroupCommit
from raymem.bank.primary import Executor
from raymem.config import Settings
from raymem.errors import Moved, RaymemError
from raymem.host.lease import Lease, clock
from raymem.logs import get_logger
from raymem.storage.journal.log import Log
from raymem.storage.store import ColdStore, Entry
from raymem.storage.tables.single_writer_table import WriterState

_log = get_logger("raymem.host.ownership")
L = TypeVar("L")


class Ownership:
    """What a host owns its banks by. When the lease or the log is lost all of it is over, and the next one begins.

    Args:
        cold: the durable store.
        settings: of the host.
        owner: the name under which banks are claimed.
        executor: the host's threads.
        over: called, with the reason, when an incarnation ends; whatever was claimed under it is to be dropped.
    """

    def __init__(
        self, cold: ColdStore, settings: Settings, owner: str, executor: Executor, over: Callable[[str], None]
    ) -> None:
        self.owner = owner
        self.group_commit: GroupCommit | None = None
        self._cold = cold
        self._settings = settings
        self._executor = executor
        self._over = over
        self._opening = asyncio.Lock()
        self.lease = self._new_lease()

    async def commits(self) -> GroupCommit:
        """The group commit of this incarnation's log, made on first use."""
        async with self._opening:
            made, lease = self.group_commit, self.lease
            # a read, an erasure or maintenance may have found it out, or nothing while no bank was hot
            fenced = made is not None and made.log.state is WriterState.LOST and made.log.id == lease.id
            if fenced or (lease.held and clock() >= lease.deadline):
                self.end("its log was fenced off" if fenced else "its lease ran out")
                lease = self.lease
            if made is None or made.log.id != lease.id:
                log = Log(self._cold.tables, lease.id, self._settings.cold.log_bytes)
                # a log whose incarnation is unknown may be swept away
                await self._executor.run(lease.hold)
                await self._executor.run(log.create)
                size = self._settings.host.group_bytes
                made = self.group_commit = GroupCommit(log, self._executor, size, lambda: self._fenced(lease))
            return made

    def claim(self, name: str, epoch: int, group_commit: GroupCommit, flushed: str | None = None) -> Entry:
        """Claim a bank in the catalog; see `Catalog.claim`.

        Raises:
            Moved: as `require_present`: the log may have been swept, and a bank that names it could never be loaded.
        """
        self.require_present(name, group_commit)
        return self._cold.catalog.claim(name, self.owner, epoch, group_commit.log.id, flushed)

    def require_present(self, name: str, group_commit: GroupCommit) -> None:
        """Raise Moved unless `group_commit` is the present incarnation's, and its lease runs."""
        if group_commit.log.id != self.lease.id or clock() >= self.lease.deadline:
            raise Moved(f"bank {name!r} is being reopened: its owner's lease ran out, or began anew, meanwhile", to="")

    def end(self, why: str) -> None:
        """Give everything up; a new incarnation claims those banks again that the catalog still says are here."""
        self._over(why)
        self.lease.give_up()
        if self.group_commit is not None:
            self.group_commit.log.let_go()
        self.lease = self._new_lease()

    def leave(self) -> None:
        """End it for everyone, once no bank is claimed under it any more."""
        last = self.group_commit.log if self.group_commit else None
        try:
            if last is not None and last.state is not WriterState.LOST and not self._cold.catalog.logged(last.id):
                last.drop()
            self.lease.release()
        except RaymemError as error:
            # it runs out by itself
            _log.warning("lease not released", owner=self.owner, error=str(error))
        finally:
            if last is not None:
                last.let_go()

    def stats(self) -> dict[str, Any]:
        """Counters of the log."""
        return self.group_commit.stats() if self.group_commit else {}

    def _new_lease(self) -> Lease:
        return Lease(self._cold.lease_table, self.owner, self._settings.host.lease_s)

    def _fenced(self, lease: Lease) -> None:
        """A bank was taken from this incarnation, and its log with it: no bank can be written through it any more."""
        if lease is self.lease:
            self.end("its log was fenced off")


class Locks(Generic[L]):
    """One lock for each key, kept only while a caller holds or awaits it: keys come from callers and never end.

    Args:
        make: makes one.
    """

    def __init__(self, make: Callable[[], L]) -> None:
        self._make = make
        self._locks: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def __getitem__(self, key: Hashable) -> L:
        lock: L = self._locks.setdefault(key, self._make())
        return lock

    def __len__(self) -> int:
        return len(self._locks)
