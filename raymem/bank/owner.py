"""The queues of a bank's owner: one before each bank, and one before the log that its host's banks share.

Both gather what comes while a commit is under way into the next one (group commit).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from raymem.bank.primary import Executor, Primary, Standing
from raymem.config import Settings
from raymem.errors import Moved, NotOwner, RaymemError
from raymem.logs import get_logger
from raymem.rows import Trace
from raymem.storage.assignment import AssignmentCache
from raymem.storage.catalog import part_of
from raymem.storage.journal.log import Log, Part
from raymem.storage.tables.single_writer_table import WriterState
from raymem.types import Ack

T = TypeVar("T")
log = get_logger("raymem.bank.owner")


def resolve(done: asyncio.Future[Any], outcome: Any) -> None:
    """Give a future its result or its error, unless its caller was cancelled."""
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


class GroupCommit:
    """The only one that commits to a host's log: at once when idle, in groups under load, without a timer.

    Args:
        log: the log.
        executor: the host's threads.
        group_bytes: what one commit may hold.
        lost: called once the log is fenced off for good.
    """

    def __init__(self, log: Log, executor: Executor, group_bytes: int, lost: Callable[[], None]) -> None:
        self.log = log
        self.parts = 0
        self.groups = 0
        self.largest = 0
        self.maintenance_errors = 0
        self._executor = executor
        self._group_bytes = group_bytes
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Part, asyncio.Future[None]]] = deque()
        self._tidied: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def commit(self, part: Part) -> None:
        """Return once a bank's rows are durable.

        Raises:
            NotOwner: the log is lost for good. StorageError: nothing is acknowledged, some of it may be there.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((part, done))
        if self._task is None:
            self._task = self._loop.create_task(self._drain(), name=f"log {self.log.id}")
        await done

    def tidy(self) -> asyncio.Future[None]:
        """Begin to take banks that have left out of the log, after the commit that is under way.

        Returns:
            What is done once that was tried; others may wait for the same.
        """
        if self._tidied is None:
            self._tidied = self._loop.create_future()
            if self._task is None:
                self._task = self._loop.create_task(self._drain(), name=f"log {self.log.id}")
        return self._tidied

    def stats(self) -> dict[str, Any]:
        """What the log holds and what its commits took; `group` is how many banks' writes a commit had on average."""
        mine = {"group": self.parts / max(1, self.groups), "largest_group": self.largest}
        return self.log.stats() | mine | {"upkeep_errors": self.maintenance_errors}

    async def _drain(self) -> None:
        try:
            while self._waiting or self._tidied:
                group: list[tuple[Part, asyncio.Future[None]]] = []
                size = 0
                while self._waiting and size < self._group_bytes:
                    group.append(self._waiting.popleft())
                    size += group[-1][0][1].nbytes
                if group:
                    outcome: Exception | None = None
                    try:
                        await self._executor.run(self.log.commit, [part for part, _ in group])
                    except Exception as error:  # noqa: BLE001 - every writer of the group hears it, none is acknowledged
                        outcome = error
                    else:
                        self.groups += 1
                        self.parts += len(group)
                        self.largest = max(self.largest, len(group))
                    for _, done in group:
                        resolve(done, outcome)
                tidied, self._tidied = self._tidied, None
                if self.log.due or (tidied and self.log.left):
                    await self._executor.run(self._maintain)
                if tidied:
                    resolve(tidied, None)
                if self.log.state is WriterState.LOST:
                    self._lost()
        finally:
            self._task = None

    def _maintain(self) -> None:
        # the group is durable already: what fails here costs time and no data
        try:
            self.log.maintain()
        except Exception as error:  # noqa: BLE001 - the writers that wait must not wait for a task that is gone
            self.maintenance_errors += 1
            log.warning("the log's maintenance failed", log=self.log.id, error=repr(error))


@dataclass(frozen=True)
class _Write:
    trace: Trace
    done: asyncio.Future[Ack]


@dataclass(frozen=True)
class _Call:
    function: Callable[[], Any]
    done: asyncio.Future[Any]
    # whether what comes after it waits for `go_on` or `leave`
    holds: bool = False


class _Due(NamedTuple):
    """What a bank needs done although no caller asks."""

    apply: bool
    compact: bool
    flush: bool
    snapshot: bool


class BankOwner:
    """Runs one bank's primary on its host's threads, one write or call at a time, in the order of their arrival.

    Writes that arrive while a commit is under way go into the next commit together: the group grows with the load and
    a lone writer does not wait. Small groups are committed together with those of the host's other banks.

    `stopped`: it does nothing any more, and what is queued hears `Moved`: the bank has left, another owner may have it,
    or the primary is no longer sound. `leaving`: it takes nothing more, as the bank is about to be served by another
    owner, or by this host again. Held (`hold`): it takes writes and calls and runs none of them.
    """

    def __init__(self, primary: Primary, executor: Executor, group_commit: GroupCommit, settings: Settings) -> None:
        name = primary.entry.name
        self.primary = primary
        self.group_commit = group_commit
        self.stopped = False
        self.leaving = False
        self.maintenance_errors = 0
        # in a bank that is no partition all streams live
        self.assignments = AssignmentCache(primary.cold, name) if part_of(name) else None
        self._executor = executor
        self._settings = settings
        # banks that were filled together must not all be flushed in the same second
        self._flush_s = settings.cold.settle_s * random.uniform(0.5, 1.0)
        self._refusal: RaymemError | None = None
        self._held = False
        self._queue: deque[_Write | _Call] = deque()
        self._wake = asyncio.Event()
        # asking for the running loop takes as long as a write's other steps
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._work(), name=f"bank {name}")

    @property
    def queued(self) -> int:
        """Writes and calls waiting."""
        return len(self._queue)

    def write(self, trace: Trace) -> asyncio.Future[Ack]:
        """Queue a trace that `Trace.checked` gave; its Ack comes once the group it went into is committed.

        Every later read sees it.
        """
        done: asyncio.Future[Ack] = self._loop.create_future()
        self._put(_Write(trace, done))
        return done

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` after the writes queued so far and before later ones."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._put(_Call(function, done))
        return await done

    async def rewrite(self, function: Callable[[], T]) -> T:
        """As `call`, for what puts another journal in place; if that fails half-way, the bank has to be loaded anew."""
        try:
            return await self.call(function)
        except RaymemError:
            if self.primary.standing is not Standing.READY:
                self.stop()
            raise

    async def finish(self, last: Callable[[], T], later: RaymemError) -> T:
        """Finish what is queued, refuse what comes `later`, run `last` and stop; if `last` fails, go on instead."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._put(_Call(last, done))
        self._refusal, self.leaving = later, isinstance(later, Moved)
        try:
            result = await done
        except BaseException:
            self._refusal, self.leaving = None, False
            raise
        # not by cancelling: the error would keep hold of all that the bank takes
        self.stop()
        return result

    async def hold(self, last: Callable[[], T]) -> T:
        """Finish what is queued, run `last`, and let what comes later wait; if `last` fails, go on instead."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._put(_Call(last, done, holds=True))
        return await done

    async def go_on(self, first: Callable[[], T]) -> T:
        """After `hold`: run `first`, then what has come meanwhile."""
        result = await self._executor.run(first)
        self._held = False
        self._wake.set()
        return result

    def leave(self, where: Moved) -> None:
        """After `hold`: stop; callers that wait hear where the bank has gone."""
        self._refusal, self.leaving = where, True
        self.stop()

    def stop(self) -> None:
        """Do nothing any more; what is queued hears so."""
        self.stopped = True
        self._wake.set()

    def nudge(self, *, flush: bool = False) -> None:
        """Do what is due after a while, or flush now, behind what is queued."""
        if not (self._queue or self.stopped or self._refusal or self._held) and (flush or any(self._due())):
            self._put(_Call(lambda: self._maintain(flush=flush), self._loop.create_future()))

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way any more."""
        return self._task.done()

    async def end(self) -> None:
        """Wait until it has `ended`."""
        await asyncio.wait([self._task])

    def _put(self, item: _Write | _Call) -> None:
        if self.stopped or self._refusal:
            resolve(item.done, self._refusal or self._reopening())
            return
        self._queue.append(item)
        self._wake.set()

    async def _work(self) -> None:
        while not self.stopped:
            self._wake.clear()
            if self._held or not self._queue:
                await self._wake.wait()
            while self._queue and not (self.stopped or self._held):
                if isinstance(self._queue[0], _Write):
                    await self._commit()
                else:
                    await self._run(self._queue.popleft())
        # nothing more may be written through a primary that was given up
        while self._queue:
            resolve(self._queue.popleft().done, self._refusal or self._reopening())

    async def _commit(self) -> None:
        """Commit the writes that stand first in the queue, as many as make a group."""
        if self.primary.standing is Standing.LOST:
            # a reader found out; its writers come again to the next owner
            self.stopped = True
            return
        group: list[_Write] = []
        size = 0
        while self._queue and isinstance(item := self._queue[0], _Write) and size < self._settings.host.group_bytes:
            self._queue.popleft()
            size += item.trace.nbytes
            group.append(item)
        outcomes: list[Ack | RaymemError]
        try:
            outcomes = await self.primary.write(
                [item.trace for item in group], self._executor, self.group_commit.commit
            )
            if any(isinstance(outcome, NotOwner) for outcome in outcomes):
                self.stopped = True
                why = await self._executor.run(self._why)
                outcomes = [why if isinstance(outcome, NotOwner) else outcome for outcome in outcomes]
        except Exception as error:  # noqa: BLE001 - handed to every writer of the group, none is acknowledged
            # the journal may be ahead of the state now: only a fresh primary, replayed from it, is sound
            self.stopped = True
            name = self.primary.entry.name
            log.error("bank lost", bank=name, error=repr(error))
            outcomes = [RaymemError(f"bank {name} failed and will be reopened: {error!r}")] * len(group)
        for item, outcome in zip(group, outcomes, strict=True):
            resolve(item.done, outcome)
        if not self.stopped and any(self._due()):
            # after the acknowledgements: rows are durable already, so a failure here costs time and no data
            await self._executor.run(self._maintain)

    def _why(self) -> RaymemError:
        """What to tell writers after a fence: another has the bank, or only the log that it shared with one that is."""
        entry = self.primary.entry
        try:
            self.primary.cold.catalog.require(entry.name, entry.id, entry.epoch)
        except RaymemError as error:
            return error
        return self._reopening()

    def _reopening(self) -> Moved:
        return Moved(f"bank {self.primary.entry.name!r} is being reopened", to="")

    def _due(self) -> _Due:
        primary, rows, cold = self.primary, self.group_commit.log, self._settings.cold
        bank, unsaved = primary.entry.id, primary.unsaved_bytes
        held, held_s = rows.held(bank)
        unsaved_s = 0.0 if primary.unsaved_since is None else time.monotonic() - primary.unsaved_since
        return _Due(
            apply=primary.apply_queue.due,
            compact=primary.journal.due,
            flush=held >= cold.settle_bytes or held_s >= self._flush_s,
            # each time the tail has grown as large as the state: in all, at most twice the bytes are written
            snapshot=unsaved_s >= cold.snapshot_s or (unsaved >= cold.snapshot_bytes and unsaved >= primary.nbytes),
        )

    def _maintain(self, *, flush: bool = False) -> None:
        try:
            due = self._due()
            self.primary.apply_queued()
            if flush or due.flush:
                self.primary.journal.flush()
            self.primary.journal.maintain()
            if due.snapshot:
                self.primary.snapshot()
        except RaymemError as error:
            self.maintenance_errors += 1
            self.stopped |= isinstance(error, NotOwner) or self.primary.standing is Standing.LOST
            log.warning("maintenance failed", bank=self.primary.entry.name, error=str(error))
        except Exception as error:  # noqa: BLE001 - writers must not wait for a task that is gone
            self.stopped = True
            log.error("bank lost", bank=self.primary.entry.name, error=repr(error))

    async def _run(self, item: _Write | _Call) -> None:
        assert isinstance(item, _Call)
        try:
            result = await self._executor.run(item.function)
            self._held = item.holds
            resolve(item.done, result)
        except Exception as error:  # noqa: BLE001 - handed to the caller
            self.stopped |= self.primary.standing is Standing.LOST
            resolve(item.done, error)
