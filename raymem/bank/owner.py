"""One hot bank's queue: writers are gathered into groups, everything that changes the bank runs in order."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from raymem.bank.apply_queue import SMALL_BYTES
from raymem.bank.group_commit import GroupCommit
from raymem.bank.replica import Runtime
from raymem.config import Settings
from raymem.errors import Moved, NotOwner, RaymemError
from raymem.executor import Executor, settle
from raymem.logs import get_logger
from raymem.storage.assignment import AssignmentCache
from raymem.types import Ack, Readout, Trace

T = TypeVar("T")
log = get_logger("raymem.bank.owner")


@dataclass(frozen=True)
class _Write:
    trace: Trace
    done: asyncio.Future[Ack]


@dataclass(frozen=True)
class _Call:
    function: Callable[[], Any]
    done: asyncio.Future[Any]
    # whether what comes after it has to wait until somebody says how it goes on
    holds: bool = False


class BankWorker:
    """Runs one bank's runtime on its host's threads.

    Writes that arrive while a commit is under way go into the next commit together: the group grows with the load and
    a lone writer waits for nobody. Small groups are committed together with those of the host's other banks, and
    applied once there are many or somebody reads.
    """

    def __init__(
        self, runtime: Runtime, executor: Executor, group_commit: GroupCommit, settings: Settings, readers: Executor
    ) -> None:
        self.runtime = runtime
        self.lost = False
        self.maintenance_errors = 0
        self.assignments = AssignmentCache(runtime.cold, runtime.entry.name)
        self._executor = executor
        self._readers = readers
        self.group_commit = group_commit
        self._settings = settings
        # banks that were filled together must not all settle in the same second
        self._settle_s = settings.cold.settle_s * random.uniform(0.5, 1.0)
        self._ending: RaymemError | None = None
        self._held = False
        self._queue: deque[_Write | _Call] = deque()
        # asking for the running loop takes as long as a write's other steps
        self._loop = asyncio.get_running_loop()
        self._stirred: asyncio.Future[None] | None = None
        self._task = self._loop.create_task(self._work(), name=f"bank {runtime.entry.name}")

    @property
    def queued(self) -> int:
        """Writes and calls waiting."""
        return len(self._queue)

    @property
    def leaving(self) -> bool:
        """Whether it takes no more writes because somebody else is about to serve the bank, maybe this host again."""
        return isinstance(self._ending, Moved)

    def write(self, trace: Trace) -> asyncio.Future[Ack]:
        """Queue a trace that `Trace.checked` gave; its Ack comes once the group it went into is committed.

        Every later read sees it.
        """
        done: asyncio.Future[Ack] = self._loop.create_future()
        self._put(_Write(trace, done))
        return done

    async def read(self, hidden_QLD: Tensor, k: int, start: int, wanted: Callable[[], bool]) -> Readout:
        """Read now, beside the writers; see `Replica.read`."""
        try:
            return await self._readers.run(lambda: self.runtime.read(hidden_QLD, k, start, wanted))
        finally:
            if self.runtime.broken:
                self.give_up()

    async def beside(self, function: Callable[[], T]) -> T:
        """Run `function`, a read, now, beside the writers."""
        return await self._readers.run(function)

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
            if self.runtime.unsure:
                self.give_up()
            raise

    async def finish(self, last: Callable[[], T], later: RaymemError) -> T:
        """Finish what is queued, refuse what comes `later`, run `last` and stop; if `last` fails, go on instead."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._put(_Call(last, done))
        self._ending = later
        try:
            result = await done
        except BaseException:
            self._ending = None
            raise
        # not by cancelling: the error would keep hold of all that the bank takes
        self.give_up()
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
        self._stir()
        return result

    def leave(self, where: Moved) -> None:
        """After `hold`: stop; whoever waits hears where the bank has gone."""
        self._ending, self.lost = where, True
        self._stir()

    def nudge(self, *, settle: bool = False) -> None:
        """Do what is due after a while, or settle now, behind what is queued."""
        if (settle or self._due()) and not (self._queue or self.lost or self._ending or self._held):
            self._put(_Call(lambda: self._maintain(settle=settle), self._loop.create_future()))

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way any more."""
        return self._task.done()

    async def end(self) -> None:
        """Wait until it has `ended`."""
        await asyncio.wait([self._task])

    def give_up(self) -> None:
        """Stop at once: another owner may have the bank; what is queued hears so."""
        self.lost = True
        self._stir()

    def _put(self, item: _Write | _Call) -> None:
        if self.lost or self._ending:
            settle(item.done, self._ending or self._reopening())
            return
        self._queue.append(item)
        self._stir()

    def _stir(self) -> None:
        if self._stirred is not None:
            settle(self._stirred, None)

    async def _work(self) -> None:
        while not self.lost:
            self._stirred = self._loop.create_future()
            if self._held or not self._queue:
                await self._stirred
            while self._queue and not (self.lost or self._held):
                group = self._next_group()
                if group:
                    await self._commit(group)
                else:
                    await self._run(self._queue.popleft())
        # a lost runtime no longer knows where its journal ends: nothing more may be written through it
        while self._queue:
            settle(self._queue.popleft().done, self._ending or self._reopening())

    def _reopening(self) -> Moved:
        return Moved(f"bank {self.runtime.entry.name!r} is being reopened", to="")

    def _next_group(self) -> list[_Write]:
        group: list[_Write] = []
        size = 0
        while self._queue and isinstance(self._queue[0], _Write) and size < self._settings.host.group_bytes:
            item = self._queue.popleft()
            assert isinstance(item, _Write)
            size += item.trace.nbytes
            group.append(item)
        return group

    async def _commit(self, group: list[_Write]) -> None:
        outcomes: list[Ack | RaymemError]
        try:
            outcomes = await self._write([item.trace for item in group])
        except Exception as error:  # noqa: BLE001 - handed to every writer of the group, none is acknowledged
            # the journal may be ahead of the state now: only a fresh runtime, replayed from it, is sound
            self.lost = True
            log.error("bank lost", bank=self.runtime.entry.name, error=repr(error))
            outcomes = [RaymemError(f"bank {self.runtime.entry.name} failed and will be reopened: {error!r}")] * len(
                group
            )
        for item, outcome in zip(group, outcomes, strict=True):
            settle(item.done, outcome)
        if self._due():
            # after the acknowledgements: rows are durable already, so a failure here costs time and no data
            await self._executor.run(self._maintain)

    async def _write(self, traces: list[Trace]) -> list[Ack | RaymemError]:
        runtime, run = self.runtime, self._executor.run
        small = sum(trace.nbytes for trace in traces) <= SMALL_BYTES and runtime.at_hand(traces)
        staged = runtime.stage(traces) if small else await run(lambda: runtime.stage(traces))
        rows = staged.rows
        # vectors that came narrow are kept as float32
        small = small and (rows is None or rows.nbytes <= SMALL_BYTES)
        try:
            if rows is not None and staged.logged:
                await self.group_commit.commit((runtime.entry, rows))
            elif rows is not None:
                await run(lambda: runtime.commit(rows, logged=False))
        except RaymemError as error:
            staged = runtime.fail(traces, error)
        outcomes = runtime.finish(staged) if small else await run(lambda: runtime.finish(staged))
        if any(isinstance(outcome, NotOwner) for outcome in outcomes):
            self.lost = True
            why = await run(self._why)
            outcomes = [why if isinstance(outcome, NotOwner) else outcome for outcome in outcomes]
        return outcomes

    def _why(self) -> RaymemError:
        """What to tell writers after a fence: another has the bank, or only the log that it shared with one that is."""
        entry = self.runtime.entry
        try:
            self.runtime.cold.catalog.require(entry.name, entry.id, entry.epoch)
        except RaymemError as error:
            return error
        return self._reopening()

    def _due(self) -> bool:
        runtime = self.runtime
        due = runtime.behind or runtime.journal.due or self._flush_due() or self._snapshot_due()
        return due and not self.lost

    def _flush_due(self) -> bool:
        rows, bank = self.group_commit.log, self.runtime.entry.id
        return rows.nbytes(bank) >= self._settings.cold.settle_bytes or rows.age_s(bank) >= self._settle_s

    def _snapshot_due(self) -> bool:
        runtime, cold = self.runtime, self._settings.cold
        # a snapshot each time the tail has grown as large as the state: in all, at most twice the bytes are written
        unsaved = runtime.unsaved_bytes
        return (unsaved >= cold.snapshot_bytes and unsaved >= runtime.nbytes) or runtime.unsaved_s >= cold.snapshot_s

    def _maintain(self, *, settle: bool = False) -> None:
        try:
            self.runtime.absorb()
            if settle or self._flush_due():
                self.runtime.journal.flush()
            self.runtime.journal.maintain()
            if self._snapshot_due():
                self.runtime.snapshot()
        except RaymemError as error:
            self.maintenance_errors += 1
            self.lost |= isinstance(error, NotOwner) or self.runtime.broken
            log.warning("upkeep failed", bank=self.runtime.entry.name, error=str(error))
        except Exception as error:  # noqa: BLE001 - writers must not wait for a worker that is gone
            self.lost = True
            log.error("bank lost", bank=self.runtime.entry.name, error=repr(error))

    async def _run(self, item: _Write | _Call) -> None:
        assert isinstance(item, _Call)
        try:
            result = await self._executor.run(item.function)
            self._held = item.holds
            settle(item.done, result)
        except Exception as error:  # noqa: BLE001 - handed to the caller
            self.lost |= self.runtime.broken
            settle(item.done, error)
