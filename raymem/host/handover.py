"""A host whose banks can move to another host while they are read and written; who does the steps is another's duty."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from raymem.bank.group_commit import GroupCommit
from raymem.bank.replica import Runtime
from raymem.config import Settings
from raymem.errors import Moved
from raymem.host.host import Host
from raymem.storage.store import ColdStore

# a source that moves a bank comes back for its copy at once
_ARRIVAL_S = 60.0


class Yielded(NamedTuple):
    """What a bank is claimed from: the epoch of the owner that let it go, and its log, where every row has settled."""

    epoch: int
    log: str


class MovingHost(Host):
    """A host that hands banks over and takes them.

    Nothing that grows with a bank is done between `yield_writes` and the end of `adopt`, while writes wait.
    """

    def __init__(self, cold: ColdStore, settings: Settings, owner: str, device: str = "cpu") -> None:
        self._departing: dict[str, str] = {}
        self._arriving: dict[str, Runtime] = {}
        self._expiring: dict[str, asyncio.TimerHandle] = {}
        super().__init__(cold, settings, owner, device)

    def held(self) -> dict[str, int]:
        """See Host."""
        return {name: runtime.nbytes for name, runtime in self._arriving.items()} | super().held()

    async def memory(self) -> dict[str, Any]:
        """See Host; `arriving` copies are not served yet."""
        return await super().memory() | {"arriving": len(self._arriving)}

    async def prepare(self, name: str) -> int:
        """At the target: copy a snapshot and the tail while the source still serves; return the position."""
        async with self._locks[name]:
            # what the hand-over will need is there before it begins
            await self.ownership.commits()
            runtime = await self._arrived(name)
            if runtime is None:
                runtime = self._arriving[name] = await self._copy(name)
                self._expire(name, runtime)
            else:
                await self._thread(runtime.catch_up)
            self._space.room.touch(name)
            self._expire(name, runtime)
            return runtime.pos

    async def settle(self, name: str) -> int:
        """At the source, before the hand-over: move rows from the log to the bank's table; return where it ends now."""
        worker = self._worker(name)
        await worker.call(worker.runtime.journal.flush)
        return worker.runtime.end

    async def yield_writes(self, name: str, to: str) -> Yielded:
        """At the source: finish queued writes, keep later ones waiting, go on answering reads.

        The catalog names the source as the owner until the target has claimed the bank: if either dies in between,
        one owner is left.
        """
        worker, lease = self._worker(name), self.ownership.lease
        if name in self._departing:
            raise Moved(f"bank {name!r} is moving to {self._departing[name]}", to=self._departing[name])
        self._departing[name] = to
        try:
            await worker.hold(worker.runtime.let_go)
            self.ownership.confirm(name, lease)
        except Exception:
            self._departing.pop(name, None)
            raise
        return Yielded(worker.runtime.entry.epoch, lease.id)

    async def adopt(self, name: str, source: Yielded) -> int:
        """At the target: claim the prepared bank, apply the last of its tail and serve it.

        Raises:
            NotOwner: the source that yielded no longer owns the bank.
        """
        async with self._locks[name]:
            group_commit = await self.ownership.commits()
            entry = await self._thread(lambda: self.ownership.claim(name, source.epoch, group_commit, source.log))
            runtime = self._arriving.pop(name, None)
            if runtime is None or runtime.entry.generation != entry.generation:
                log = group_commit.log
                runtime = await self._thread(lambda: Runtime.open(self.cold, entry, device=self.device, log=log))
            else:
                runtime.log = group_commit.log
                await self._thread(lambda: runtime.own(entry))
            self._serve(name, runtime, group_commit)
            return runtime.pos

    async def resume(self, name: str) -> None:
        """At the source: the target failed, so go on, with the writes that waited, unless it has claimed the bank.

        Then the bank is the target's for as long as its lease runs, as any other; whoever waited hears so.
        """
        worker = self._worker(name)
        try:
            group_commit = await self.ownership.commits()
            entry = await self._thread(lambda: self.cold.catalog.get(name))
            if entry.owner != self.owner:
                raise Moved(f"bank {name!r} has moved", to=entry.owner or "")
            # the target comes too late from here on
            claimed = await self._thread(lambda: self.ownership.claim(name, entry.epoch, group_commit))
            worker.assignments.release(None)
            await worker.go_on(lambda: worker.runtime.own(claimed))
        except Moved as moved:
            self._workers.pop(name, None)
            worker.leave(moved)
        except Exception as error:
            # whoever the catalog names now has the bank: a fresh start tells
            self._workers.pop(name, None)
            worker.leave(Moved(f"bank {name!r} is being reopened: {error}", to=""))
            raise
        finally:
            self._departing.pop(name, None)

    async def forget_moved(self, name: str) -> None:
        """At the source: the target serves, so free the bank; whoever waited hears where it is."""
        worker, to = self._workers.pop(name, None), self._departing.pop(name, "")
        if worker is not None:
            worker.leave(Moved(f"bank {name!r} has moved", to=to))
            await self._depart(worker)

    def abandon(self, name: str, runtime: Runtime | None = None) -> bool:
        """At the target: drop what was prepared; if `runtime` is named, only that. Says whether there was something."""
        found = self._arriving.get(name)
        if found is None or runtime not in (None, found):
            return False
        del self._arriving[name]
        self._expiring.pop(name).cancel()
        return True

    def _expire(self, name: str, runtime: Runtime) -> None:
        """A source that dies half-way tells nobody: its copy must not stay for good."""
        if earlier := self._expiring.pop(name, None):
            earlier.cancel()
        self._expiring[name] = asyncio.get_running_loop().call_later(_ARRIVAL_S, self.abandon, name, runtime)

    async def _arrived(self, name: str) -> Runtime | None:
        """The copy that is here, unless rows of it were erased since: its state has them still."""
        found = self._arriving.get(name)
        if found is not None:
            entry = await self._thread(lambda: self.cold.catalog.get(name))
            if found.entry.generation != entry.generation:
                self.abandon(name, found)
        return self._arriving.get(name)

    async def _copy(self, name: str) -> Runtime:
        entry = await self._thread(lambda: self.cold.catalog.get(name))
        # before anything moves
        await self._space.admit(entry)
        runtime = await self._thread(lambda: Runtime(self.cold, entry, device=self.device))
        await self._thread(runtime.recover)
        return runtime

    async def _evict(self, name: str) -> bool:
        return self.abandon(name) or (name not in self._departing and await super()._evict(name))

    def _serve(self, name: str, runtime: Runtime, group_commit: GroupCommit) -> None:
        super()._serve(name, runtime, group_commit)
        self._arriving.pop(name, None)
        self._departing.pop(name, None)

    def _drop_all(self, why: str) -> None:
        super()._drop_all(why)
        self._departing.clear()
