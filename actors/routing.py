"""Finds the shard that has a bank, follows the bank when it moves, and repeats calls that a crash cut short."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from raymem.actors import cluster
from raymem.actors.calls import Remote, ask, ask_all
from raymem.actors.placement import RunningShard, Topology, choose, node_prefix
from raymem.actors.shard import ClusterSpec
from raymem.client.local import over
from raymem.config import ActorSettings
from raymem.errors import BackendUnavailable, Conflict, Moved, NotOwner, RaymemError, Unavailable
from raymem.host.backend import detached
from raymem.retry import retrying
from raymem.storage.store import ColdStore, Entry

T = TypeVar("T")
# only the bank's owner answers these, however long it takes
_SERVED = {"write", "read", "attend", "digest"}
# the directory only saves a read of the catalog, so no call waits long for it
_DIRECTORY_S = 5.0
# after so long without an answer, the catalog is asked whether the bank has another owner
_CHECK_S = 1.0
# how often a lease is checked
_POLL_S = 0.2
# a head that is only busy answers much sooner
_HEAD_S = 10.0
# new bank names never end, so what is remembered of them is bounded
_MOST_NAMES = 2**16


class _Again(Exception):
    """A call that may be repeated, perhaps elsewhere; `error` is raised when the time is over."""

    def __init__(self, error: RaymemError) -> None:
        super().__init__(error)
        self.error = error


async def _repeat(once: Callable[[], Awaitable[T]], retry_s: float) -> T:
    try:
        return await retrying(once, _Again, retry_s, first_s=0.004, longest_s=0.25)
    except _Again as again:
        raise again.error from again


async def running_spec(directory: Remote, settings: ActorSettings) -> ClusterSpec | None:
    """What the cluster's raymem was started with; None if it does not run there."""

    async def once() -> ClusterSpec | None:
        try:
            spec: ClusterSpec = await directory.call("spec")
        except BackendUnavailable as error:
            if error.details.get("gone"):
                return None
            raise _Again(error) from error
        return spec

    return await _repeat(once, settings.retry_s)


class Router:
    """One client's cache of which shard has a bank; the shard that it leads to checks every call."""

    def __init__(self, cold: ColdStore, directory: Remote, settings: ActorSettings) -> None:
        self.topology = Topology()
        self._cold = cold
        self._directory = directory
        self._settings = settings
        self._head = cluster.Head(min(settings.retry_s, _HEAD_S))
        self._remotes: dict[str, Remote] = {}
        self._routes: dict[str, str] = {}
        self._stale: set[str] = set()

    def remote(self, shard: str) -> Remote:
        """A shard by its name."""
        return self._remotes.setdefault(shard, Remote(shard))

    async def refresh(self, *, retry_failed: bool = False) -> Topology:
        """Ask the directory which shards there are; without an answer in `retry_s` the known ones are returned.

        Raises:
            BackendUnavailable: it does not answer, and nothing is known.
        """

        async def once() -> Topology:
            try:
                # a directory that is cut off from the cluster's head waits for Ray until it is back
                limit_s = self._settings.retry_s if self.topology.shards else float("inf")
                found: Topology = await ask(self._directory, "ensure", retry_failed, timeout_s=limit_s)
            except BackendUnavailable as error:
                if self.topology.shards:
                    # which nodes are drained is in the cold store
                    draining = await asyncio.to_thread(self._cold.draining.nodes)
                    return dataclasses.replace(self.topology, draining=draining)
                raise _Again(error) from error
            return found

        self.topology = await _repeat(once, self._settings.retry_s)
        return self.topology

    async def call(self, bank: str, method: str, *args: Any, done_if: type[RaymemError] | None = None) -> Any:
        """Run a shard's method on a bank, wherever it is.

        Args:
            bank: its name.
            method: of Shard; takes the bank's name first.
            args: the rest of its arguments.
            done_if: an error which, after an attempt that was cut short, says that this attempt had done its work.

        Raises:
            BankDetached: the bank is cold.
            BackendUnavailable: its shard did not come back in time.
            Unavailable: its shard's node has left the cluster.
        """
        attempt = 0

        async def once() -> Any:
            nonlocal attempt
            attempt += 1
            try:
                shard = self._routes.get(bank) or await self._find(bank)
                return await self._ask(bank, shard, method, *args)
            except RaymemError as error:
                if attempt > 1 and done_if is not None and isinstance(error, done_if):
                    return None
                raise

        return await _repeat(once, self._settings.retry_s)

    async def call_in_time(self, bank: str, method: str, *args: Any) -> Any:
        """As `call`, given up after `retry_s` even if the shard is silent: for calls that are short by nature."""
        try:
            async with asyncio.timeout(self._settings.retry_s):
                return await self.call(bank, method, *args)
        except TimeoutError:
            shard = self._routes.get(bank, "its shard")
            raise BackendUnavailable(
                f"{shard} gave no answer for bank {bank!r} within {self._settings.retry_s:g} s; what was asked may "
                "have been done: a write can safely be repeated",
                shard=shard,
            ) from None

    async def load(self, bank: str, candidates: Sequence[RunningShard], node: str | None) -> None:
        """Make a bank hot on one of the candidates, unless it is hot on one already.

        Raises:
            Conflict: it is hot elsewhere and `node` was asked for, or a living process outside the cluster holds it.
        """

        async def once() -> None:
            entry = await asyncio.to_thread(self._cold.catalog.get, bank)
            owner = entry.owner
            if owner is None or await self._may_be_taken(bank, owner):
                await self._place(entry, candidates, owner or "")
                return
            if node is not None and owner not in {info.name for info in candidates}:
                where = self.topology.node_of(owner) or owner
                raise Conflict(f"bank {bank!r} is hot on {where}; move it: bank.migrate({node!r})", owner=owner)
            await self._ask(bank, owner, "attach", "")

        await _repeat(once, self._settings.retry_s)

    async def discard(self, bank: str, owner: str) -> None:
        """Have the owner of a bank free it without a flush, unless the owner has left the cluster for good.

        Raises:
            Conflict: a living process outside the cluster holds it.
        """

        async def once() -> None:
            if not await self._may_be_taken(bank, owner):
                await self._ask(bank, owner, "discard")

        await _repeat(once, self._settings.retry_s)
        self.forget(bank)

    async def least(self, bank: str, candidates: Sequence[RunningShard]) -> str:
        """The best candidate for a bank; see `choose`."""
        loads = await ask_all([self.remote(info.name) for info in candidates], "bytes")
        return choose(bank, candidates, loads, prefer_gpu=self._settings.gpus_per_shard > 0).name

    def forget(self, bank: str) -> None:
        """Look the bank up again before its next call."""
        self._routes.pop(bank, None)
        if len(self._stale) >= _MOST_NAMES:
            # the shard that a stale route leads to checks the call
            self._stale.clear()
            self._routes.clear()
        self._stale.add(bank)

    async def _ask(self, bank: str, shard: str, method: str, *args: Any) -> Any:
        try:
            answer = await self._answer(bank, shard, method, args)
        except Moved as moved:
            self.forget(bank)
            if moved.to:
                self._routes[bank] = moved.to
            raise _Again(moved) from moved
        except NotOwner as error:
            self.forget(bank)
            raise _Again(error) from error
        except BackendUnavailable as error:
            self.forget(bank)
            # a shard may also report that another shard, which it called, is silent
            if error.details.get("shard") != shard:
                raise
            if await self._has_left(shard):
                # the directory gives its banks to other shards when its lease has expired
                raise _Again(_gone(bank, shard)) from error
            raise _Again(error) from error
        self._routes[bank] = shard
        self._stale.discard(bank)
        return answer

    async def _answer(self, bank: str, shard: str, method: str, args: Sequence[Any]) -> Any:
        call = asyncio.ensure_future(self.remote(shard).call(method, bank, *args))
        try:
            while not (await asyncio.wait({call}, timeout=_CHECK_S))[0]:
                if method in _SERVED and (await asyncio.to_thread(self._cold.catalog.get, bank)).owner != shard:
                    raise Moved(f"{shard} was silent and no longer has bank {bank!r}", to="")
            return call.result()
        finally:
            call.cancel()

    async def _find(self, bank: str) -> str:
        with suppress(BackendUnavailable, TimeoutError):
            async with asyncio.timeout(_DIRECTORY_S):
                owner: str | None = await self._directory.call("owner", bank, bank in self._stale)
            if owner is not None:
                return owner
        entry = (await asyncio.to_thread(self._cold.catalog.get, bank)).whole()
        if entry.state == "cold":
            raise detached(bank)
        return entry.owner or await self._place(entry, (await self.refresh()).taking(), "")

    async def _may_be_taken(self, bank: str, owner: str) -> bool:
        if not await self._has_left(owner):
            return False
        if not await over(self._cold.lease_table, owner, _POLL_S):
            raise _gone(bank, owner)
        return True

    async def _has_left(self, shard: str) -> bool:
        try:
            return await self._head.has_lost(shard)
        except BackendUnavailable as error:
            raise _Again(error) from error

    async def _place(self, entry: Entry, candidates: Sequence[RunningShard], take_from: str) -> str:
        shard = await self.least(entry.name, candidates)
        await self._ask(entry.name, shard, "attach", take_from)
        return shard


def _gone(bank: str, owner: str) -> RaymemError:
    if not node_prefix(owner):
        return Conflict(
            f"bank {bank!r} is held by {owner}, outside this cluster; close it there, then take it: bank.attach()",
            owner=owner,
        )
    return Unavailable(
        f"bank {bank!r} was on {owner}, whose node has left the cluster; no row is lost: it is loaded elsewhere once "
        "that lease has run out, try again",
        owner=owner,
    )
