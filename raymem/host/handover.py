"""A host whose banks can move to another host while they are read and written; `actors.migration` has the order."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

from raymem.bank.owner import GroupCommit
from raymem.bank.primary import Primary
from raymem.config import Settings
from raymem.errors import Moved
from raymem.host.host import Host
from raymem.host.lease import clock
from raymem.storage.store import ColdStore

# a source that moves a bank comes back for its copy at once
_ARRIVAL_S = 60.0


class Yielded(NamedTuple):
    """What a bank is claimed from: the epoch of the owner that let it go, and its log, whose rows are all flushed."""

    epoch: int
    log: str


class MovingHost(Host):
    """A host that hands banks over and takes them.

    Nothing that grows with a bank is done between `yield_writes` and the end of `adopt`, while writes wait.
    """

    def __init__(self, cold: ColdStore, settings: Settings, owner: str, device: str = "cpu") -> None:
        self._departing: dict[str, str] = {}
        self._arriving: dict[str, Primary] = {}
        self._expiring: dict[str, asyncio.TimerHandle] = {}
        super().__init__(cold, settings, owner, device)

    async def memory(self) -> dict[str, Any]:
        """See Host; `arriving` copies are not served yet."""
        return await super().memory() | {"arriving": len(self._arriving)}

    async def prepare(self, name: str) -> int:
        """At the target: copy a snapshot and the tail while the source still serves; return the position."""
        async with self._locks[name]:
            # what the handover will need is there before it begins
            await self.ownership.commits()
            primary = await self._arrived(name)
            if primary is None:
                primary = self._arriving[name] = await self._copy(name)
                self._expire(name, primary)
            else:
                await self._executor.run(primary.catch_up)
            primary.used = time.monotonic()
            self._expire(name, primary)
            return primary.pos

    async def quiesce(self, name: str) -> int:
        """At the source, before the handover: move rows from the log to the bank's table; return where it ends now."""
        owner = self._owner(name)
        await owner.call(owner.primary.journal.flush)
        return owner.primary.end

    async def yield_writes(self, name: str, to: str) -> Yielded:
        """At the source: finish queued writes, keep later ones waiting, go on answering reads.

        The catalog names the source as the owner until the target has claimed the bank: if either dies in between,
        one owner is left.
        """
        owner, lease = self._owner(name), self.ownership.lease
        if name in self._departing:
            raise Moved(f"bank {name!r} is moving to {self._departing[name]}", to=self._departing[name])
        self._departing[name] = to
        try:
            await owner.hold(owner.primary.let_go)
            if clock() >= lease.deadline:
                raise self._silent(name, lease)
        except Exception:
            self._departing.pop(name, None)
            raise
        return Yielded(owner.primary.entry.epoch, lease.id)

    async def adopt(self, name: str, source: Yielded) -> int:
        """At the target: claim the prepared bank, apply the last of its tail and serve it.

        Raises:
            NotOwner: the source that yielded no longer owns the bank.
        """
        async with self._locks[name]:
            group_commit = await self.ownership.commits()
            entry = await self._executor.run(self.ownership.claim, name, source.epoch, group_commit, source.log)
            primary = self._arriving.pop(name, None)
            if primary is None or primary.entry.generation != entry.generation:
                primary = await self._executor.run(Primary.open, self.cold, entry, self.device, group_commit.log)
            else:
                primary.log = group_commit.log
                await self._executor.run(primary.own, entry)
            self._serve(name, primary, group_commit)
            return primary.pos

    async def resume(self, name: str) -> None:
        """At the source: the target failed, so go on, with the writes that waited, unless it has claimed the bank.

        Then the bank is the target's for as long as its lease runs, as any other; callers that waited hear so.
        """
        owner = self._owner(name)
        try:
            group_commit = await self.ownership.commits()
            entry = await self._executor.run(self.cold.catalog.get, name)
            if entry.owner != self.owner:
                raise Moved(f"bank {name!r} has moved", to=entry.owner or "")
            # the target comes too late from here on
            claimed = await self._executor.run(self.ownership.claim, name, entry.epoch, group_commit)
            if owner.assignments is not None:
                owner.assignments.release(None)
            await owner.go_on(lambda: owner.primary.own(claimed))
        except Moved as moved:
            self._owners.pop(name, None)
            owner.leave(moved)
        except Exception as error:
            # the owner that the catalog names now has the bank: a fresh start tells
            self._owners.pop(name, None)
            owner.leave(Moved(f"bank {name!r} is being reopened: {error}", to=""))
            raise
        finally:
            self._departing.pop(name, None)

    async def forget_moved(self, name: str) -> None:
        """At the source: the target serves, so free the bank; callers that waited hear where it is."""
        owner, to = self._owners.pop(name, None), self._departing.pop(name, "")
        if owner is not None:
            owner.leave(Moved(f"bank {name!r} has moved", to=to))
            await self._depart(owner)

    def abandon(self, name: str, primary: Primary | None = None) -> bool:
        """At the target: drop what was prepared; if `primary` is named, only that. Says whether there was something."""
        found = self._arriving.get(name)
        if found is None or primary not in (None, found):
            return False
        del self._arriving[name]
        self._expiring.pop(name).cancel()
        return True

    def _expire(self, name: str, primary: Primary) -> None:
        """A source that dies half-way says nothing: its copy must not stay for good."""
        if earlier := self._expiring.pop(name, None):
            earlier.cancel()
        self._expiring[name] = asyncio.get_running_loop().call_later(_ARRIVAL_S, self.abandon, name, primary)

    async def _arrived(self, name: str) -> Primary | None:
        """The copy that is here, unless rows of it were erased since: its state has them still."""
        found = self._arriving.get(name)
        if found is not None:
            entry = await self._executor.run(self.cold.catalog.get, name)
            if found.entry.generation != entry.generation:
                self.abandon(name, found)
        return self._arriving.get(name)

    async def _copy(self, name: str) -> Primary:
        entry = await self._executor.run(self.cold.catalog.get, name)
        # before anything moves
        await self._memory.admit(entry)
        primary = await self._executor.run(Primary, self.cold, entry, self.device)
        await self._executor.run(primary.recover)
        return primary

    def _loaded(self) -> dict[str, Primary]:
        return self._arriving | super()._loaded()

    async def _evict(self, name: str) -> bool:
        return self.abandon(name) or (name not in self._departing and await super()._evict(name))

    def _serve(self, name: str, primary: Primary, group_commit: GroupCommit) -> None:
        super()._serve(name, primary, group_commit)
        self._arriving.pop(name, None)
        self._departing.pop(name, None)

    def _drop_all(self, why: str) -> None:
        super()._drop_all(why)
        self._departing.clear()
