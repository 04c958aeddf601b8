"""Many banks at work in one process: what a local store and a shard actor both are."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor

from raymem.bank.erase import erase
from raymem.bank.group_commit import GroupCommit
from raymem.bank.owner import BankWorker
from raymem.bank.replica import Runtime
from raymem.config import Settings
from raymem.errors import Moved, RaymemError, StoreClosed
from raymem.executor import Executor
from raymem.host.admission import Limiter
from raymem.host.backend import detached
from raymem.host.budget import PAST, LruLimit
from raymem.host.locks import Locks
from raymem.host.maintenance import Maintenance
from raymem.host.memory_budget import MemoryBudget
from raymem.host.owed import Owed
from raymem.host.ownership import Ownership
from raymem.host.point_in_time import PointInTimeCache
from raymem.logs import get_logger
from raymem.storage.assignment import AssignmentCache
from raymem.storage.store import ColdStore, Entry
from raymem.types import Ack, EraseReceipt, Readout, Selection, Trace

T = TypeVar("T")
log = get_logger("raymem.host.host")
_TICK_S = 1.0


class Host:
    """Banks owned by one process, each behind its own queue.

    Args:
        cold: the durable store.
        settings: limits and sizes.
        owner: the name under which banks are claimed in the catalog.
        device: where states live, "cpu" or "cuda:N".
    """

    def __init__(self, cold: ColdStore, settings: Settings, owner: str, device: str = "cpu") -> None:
        self.cold = cold
        self.settings = settings
        self.owner = owner
        self.device = device
        self._pool = ThreadPoolExecutor(settings.host.threads, thread_name_prefix="raymem")
        self._executor = Executor(self._pool)
        # reads may be long: no commit and no lease waits for them, and no caller has all of their threads
        self._readers = ThreadPoolExecutor(settings.host.threads + 1, thread_name_prefix="raymem-read")
        self._turns = Locks(lambda: asyncio.Semaphore(settings.host.threads))
        self.ownership = Ownership(cold, settings, owner, self._executor, self._drop_all)
        self._ticker: asyncio.TimerHandle | None = None
        self._limiter = Limiter(settings.host)
        self.past = PointInTimeCache(cold, settings.host.past_bytes, device)
        self._workers: dict[str, BankWorker] = {}
        self._lost: dict[str, BankWorker] = {}
        self._owed = Owed()
        self._closing = False
        self._locks = Locks(asyncio.Lock)
        self._maintenance = Maintenance(
            cold, settings.cold, self.names, lambda name, what: self.erase(name, what, rebuild=True)
        )
        setting = "host.memory_bytes" if device == "cpu" else "host.gpu_memory_bytes"
        self._space = MemoryBudget(
            cold, LruLimit(owner, self.memory_bytes, setting), self._executor, self.held, self._evict
        )

    def has(self, name: str) -> bool:
        """Whether the bank is hot here."""
        self._check_lease()
        worker = self._workers.get(name)
        return worker is not None and not worker.lost and not worker.leaving

    def names(self) -> list[str]:
        """The banks that are hot here."""
        return sorted(self._workers)

    @property
    def memory_bytes(self) -> int | None:
        """What the banks here may take together, None if nothing was set."""
        limits = self.settings.host
        return limits.memory_bytes if self.device == "cpu" else limits.gpu_memory_bytes

    def bytes(self) -> dict[str, int]:
        """Bytes of each hot bank's state."""
        return {name: worker.runtime.nbytes for name, worker in self._workers.items()}

    def held(self) -> dict[str, int]:
        """Bytes of everything that counts against `memory_bytes`."""
        return self.bytes() | {PAST: self.past.nbytes}

    async def memory(self) -> dict[str, Any]:
        """What is in memory, what stays there, and how often a bank had to leave."""
        return await self._space.stats() | {"loaded": len(self._workers)}

    async def attach(self, name: str, *, take_from: str | None = None, epoch: int | None = None) -> Entry:
        """Claim a bank in the catalog and load it: snapshot, then the journal's tail; return its line in the catalog.

        Args:
            name: the bank.
            take_from: the only other owner that it may be taken from; by default whoever has it.
            epoch: the only one at which it may be: an owner that died may have come back under its name and claimed it.

        Raises:
            Moved: another owner has it.
        """
        async with self._locks[name]:
            if self.has(name):
                return self._workers[name].runtime.entry
            entry = (await self._thread(lambda: self.cold.catalog.get(name))).whole()
            is_later = epoch not in (None, entry.epoch)
            if take_from is not None and (entry.owner not in (None, self.owner, take_from) or is_later):
                raise Moved(f"bank {name!r} is hot on {entry.owner}", to=entry.owner or "")
            return await self._load(entry)

    async def reopen(self, name: str) -> None:
        """Load a bank that the catalog says is hot here: after a restart, or after its worker was lost.

        Raises:
            BankDetached: it is cold.
            Moved: another owner has it; `to` is empty if it is hot and nobody has it.
        """
        async with self._locks[name]:
            if self.has(name):
                return
            entry = await self._thread(lambda: self.cold.catalog.get(name))
            if entry.state == "cold":
                raise detached(name)
            if entry.owner != self.owner:
                raise Moved(f"bank {name!r} is not on {self.owner}", to=entry.owner or "")
            await self._load(entry)

    async def detach(self, name: str, state: str = "cold") -> None:
        """Finish queued writes, snapshot, release the bank in the catalog as `state`, free its memory."""
        async with self._locks[name]:
            worker = self._worker(name)
            runtime = worker.runtime
            away = Moved(f"bank {name!r} is leaving {self.owner}", to="") if state == "hot" else detached(name)
            await worker.finish(runtime.rest, away)
            self._workers.pop(name, None)
            self._space.room.forget(name)
            epoch, settled = runtime.entry.epoch, None if runtime.log is None else runtime.log.id
            await self._thread(lambda: self.cold.catalog.release(name, epoch, state=state, log=settled))
            if state == "cold":
                await self._depart(worker)

    async def discard(self, name: str) -> None:
        """Free a bank that is about to be removed, at once: nothing is written down, and its rows leave the log."""
        async with self._locks[name]:
            self._retire_lost(name)
            worker = self._workers.pop(name, None) or self._lost.pop(name, None)
            if worker is None:
                return
            worker.give_up()
            await worker.end()
            runtime, rows = worker.runtime, worker.group_commit.log
            await self._thread(lambda: self.cold.catalog.disown(runtime.entry.id, self.owner))
            rows.forget(runtime.entry.id)
            await self._depart(worker)

    async def write(self, name: str, trace: Trace, *, durable: bool = True, caller: str = "") -> Ack:
        """Journal a trace; every read that comes after the Ack sees it.

        With `durable=False` the Ack comes once the trace is checked and queued; its commit may still fail, which is
        counted in `stats`.

        Raises:
            Overloaded: the caller has too much in flight.
            InvalidTrace, NonFinite, SequenceConflict: refused, nothing written.
            NotOwner: the lease ran out meanwhile; the rows may be there, and writing them again is safe.
            TooLarge: the bank alone takes more memory than there is here.
            Reassigned: the bank is a partition, and the stream lives in another.
        """
        # nothing is waited for between this and the queue
        worker, lease = (
            await self._home(name, lambda streams: streams.require(trace.stream)),
            self.ownership.lease,
        )
        self._space.check(name, lambda: worker.runtime.nbytes)
        if durable:
            with self._limiter.admit(caller, trace.nbytes):
                ack = await worker.write(trace)
            self.ownership.confirm(name, lease)
            self._space.watch(name)
            return ack
        with ExitStack() as admitted:
            admitted.enter_context(self._limiter.admit(caller, trace.nbytes))
            trace.validate(worker.runtime.spec.fingerprint)
            done = worker.write(trace)
            if done.done():
                # the bank is just leaving: nothing was accepted
                done.result()
            self._owed.add(name, trace, done)
            until_done = admitted.pop_all()
        done.add_done_callback(lambda _: until_done.close())
        return Ack(rows=len(trace), duplicates=0, end=-1, gaps=0, durable=False)

    async def read(
        self,
        name: str,
        hidden_QLD: Tensor,
        k: int = 32,
        start: int = 1,
        *,
        as_of: str | float | None = None,
        caller: str = "",
    ) -> Readout:
        """Read a bank, or what it was at a tag or time; runs beside writers.

        Raises:
            NotOwner: the lease ran out meanwhile, so the answer may be old.
            TooLarge: there is no memory for the bank as it was beside the bank as it is.
        """
        worker, lease, turn = self._worker(name), self.ownership.lease, self._turns[caller]
        with self._limiter.admit(caller, hidden_QLD.nbytes):
            async with turn:
                readout = await self._read(worker, hidden_QLD, k, start, as_of)
        self.ownership.confirm(name, lease)
        return readout

    async def mark(self, name: str, tag: str) -> dict[str, int]:
        """Tag a bank's position after the writes queued so far; return all tags."""
        worker = self._worker(name)
        return await worker.call(lambda: worker.runtime.mark(tag))

    async def materialise(self, name: str) -> None:
        """Copy what a fork inherited into its own journal; writes wait meanwhile, reads don't."""
        worker = self._worker(name)
        await worker.rewrite(worker.runtime.materialise)

    async def erase(self, name: str, what: Selection, rebuild: bool = False) -> EraseReceipt:
        """Erase rows after the writes queued so far; later ones wait; see `raymem.bank.erase`."""
        worker = self._worker(name)
        receipt = await worker.rewrite(lambda: erase(worker.runtime, what, rebuild=rebuild))
        # what banks were may hold the rows still, this one's and its forks'
        self.past.forget()
        return receipt

    async def release(self, name: str, stream: str | None) -> None:
        """Finish the writes queued so far, and look up where a stream lives, or any, before later ones."""
        worker = self._worker(name)
        worker.assignments.release(stream)
        await worker.call(lambda: None)

    async def pull(self, name: str, source: str, stream: str, start: int) -> tuple[int, int]:
        """Copy a stream's rows from another bank's journal, under their own names; those that are there stay.

        Returns:
            How many were new, and the position in that journal up to which all were seen: where to go on.
        """
        lease, copied = self.ownership.lease, 0
        journal = self.cold.journal(await self._thread(lambda: self.cold.catalog.get(source)))
        end = await self._thread(journal.end)
        rows = journal.of_stream(stream, start)
        while (part := await self._thread(lambda: next(rows, None))) is not None:
            worker = await self._home(name, lambda streams: streams.expect(stream))
            acks = await asyncio.gather(*map(worker.write, part.traces()))
            copied += sum(ack.rows for ack in acks)
        self.ownership.confirm(name, lease)
        self._space.watch(name)
        return copied, end

    async def digest(self, name: str) -> str:
        """sha256 of the bank's whole state, after the writes queued so far."""
        worker, lease = self._worker(name), self.ownership.lease
        digest = await worker.call(worker.runtime.digest)
        self.ownership.confirm(name, lease)
        return digest

    async def snapshot(self, name: str) -> int:
        """Snapshot a bank after the writes queued so far; return the position it stands at."""
        worker = self._worker(name)
        return await worker.call(worker.runtime.snapshot)

    async def stats(self) -> dict[str, Any]:
        """Counters of this process and of each hot bank."""
        banks = {name: await self._bank_stats(worker) for name, worker in sorted(self._workers.items())}
        about = {"owner": self.owner, "device": self.device, "refused_overload": self._limiter.refused}
        about |= {"unwritten_rows": self._owed.lost_rows}
        about |= {"memory": await self.memory(), "log": self.ownership.stats()}
        return about | {"banks": banks}

    async def close(self) -> None:
        """Snapshot and release every bank; they stay attached in the catalog and load on next use.

        Raises:
            StorageError: rows that were accepted with `durable=False` could not be written; all else was let go.
        """
        self._closing = True
        self._maintenance.stop()
        if self._ticker is not None:
            self._ticker.cancel()
        await self._space.rest()
        for name in self.names():
            try:
                await self.detach(name, state="hot")
            except RaymemError as error:
                # every row is in the journal already; the next owner replays it
                log.warning("bank not settled on close", bank=name, error=str(error))
                self._workers.pop(name, None)
        await asyncio.to_thread(self.ownership.leave)
        await asyncio.to_thread(self._end_threads)
        self._owed.require_paid()

    def end(self) -> None:
        """`close` once the event loop has ended: write what was accepted, and let every bank go as it is.

        Raises:
            StorageError: as `close`.
        """
        self._closing = True
        self._end_threads()
        for name, traces in self._owed.left().items():
            worker = self._workers.get(name)
            if worker is None:
                continue
            # some may be there, and are then acknowledged as duplicates
            worker.runtime.unsure = True
            self._owed.settle(name, worker.runtime.write(traces))
        self._workers.clear()
        self.ownership.leave()
        self._owed.require_paid()

    async def _evict(self, name: str) -> bool:
        """Take a bank out of memory; it stays this owner's, and loads again at its next use."""
        if name == PAST:
            self.past.forget()
            return True
        # one that is being attached, moved or detached is not waited for: that might need room itself
        if self._locks[name].locked():
            return False
        async with self._locks[name]:
            worker = self._workers.get(name)
            if worker is None or worker.lost:
                return False
            await worker.finish(worker.runtime.rest, Moved(f"bank {name!r} makes room for others just now", to=""))
            self._workers.pop(name, None)
            return True

    def _retire_lost(self, name: str) -> None:
        worker = self._workers.get(name)
        if worker is not None and worker.lost:
            del self._workers[name]
            if not worker.ended:
                self._lost[name] = worker

    async def _load(self, entry: Entry) -> Entry:
        if self._closing:
            raise StoreClosed(f"bank {entry.name!r} is not loaded: this store is closed; connect again")
        self._retire_lost(entry.name)
        if (former := self._lost.pop(entry.name, None)) is not None:
            # it may have a commit under way, in the log that the next one uses too
            await former.end()
        await self._space.admit(entry)
        group_commit = await self.ownership.commits()
        claimed = await self._thread(lambda: self.ownership.claim(entry.name, entry.epoch, group_commit))
        try:
            runtime = await self._thread(
                lambda: Runtime.open(self.cold, claimed, device=self.device, log=group_commit.log)
            )
            await self._space.make(entry.name, runtime.nbytes)
        except Exception:
            # a bank that was hot stays so: whoever uses it next hears why it can't be loaded
            if entry.state == "cold":
                mine = group_commit.log.id
                await self._thread(lambda: self.cold.catalog.release(entry.name, claimed.epoch, log=mine))
            raise
        self._serve(entry.name, runtime, group_commit)
        return runtime.entry

    def _check_lease(self) -> None:
        if self._workers:
            self.ownership.check()

    def _drop_all(self, why: str) -> None:
        """The incarnation is over: other owners may have any of its banks."""
        log.error("incarnation over", owner=self.owner, reason=why, banks=len(self._workers))
        for worker in self._workers.values():
            worker.give_up()
        self._workers.clear()

    def _serve(self, name: str, runtime: Runtime, group_commit: GroupCommit) -> None:
        self.ownership.require_same(name, group_commit)
        self._workers[name] = BankWorker(runtime, self._executor, group_commit, self.settings, Executor(self._readers))
        self._maintenance.start()
        if self._ticker is None:
            self._tick()

    def _tick(self) -> None:
        """See to banks that nobody writes to: what lies in the log for long settles, what lies unsaved is saved."""
        self._ticker = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        for worker in self._workers.values():
            worker.nudge()
        if self.ownership.group_commit is not None:
            held = self.ownership.group_commit.log
            if held.left:
                # an earlier try failed
                self.ownership.group_commit.tidy()
            oldest = set(held.oldest(held.nbytes() - held.limit // 2))
            for worker in self._workers.values():
                if worker.runtime.entry.id in oldest:
                    worker.nudge(settle=True)

    async def _depart(self, worker: BankWorker) -> None:
        """A bank that has settled here goes elsewhere: what is erased there must not stay in this host's log."""
        worker.group_commit.log.leave(worker.runtime.entry.id)
        await asyncio.shield(worker.group_commit.tidy())

    def _worker(self, name: str) -> BankWorker:
        self._check_lease()
        self._retire_lost(name)
        worker = self._workers.get(name)
        if worker is None:
            raise Moved(f"bank {name!r} is not hot on {self.owner}", to="")
        self._space.room.touch(name)
        return worker

    async def _home(self, name: str, check: Callable[[AssignmentCache], Awaitable[None]]) -> BankWorker:
        """The bank's worker, once its partition may take the rows; a check that takes time may find another."""
        while True:
            worker = self._worker(name)
            await check(worker.assignments)
            if worker is self._worker(name):
                return worker

    async def _bank_stats(self, worker: BankWorker) -> dict[str, Any]:
        runtime = worker.runtime
        journal = await self._thread(runtime.journal.stats)
        return {
            "kind": runtime.spec.kind,
            "rows": runtime.end,
            "bytes": runtime.nbytes,
            "budget_bytes": runtime.spec.budget_bytes,
            "epoch": runtime.entry.epoch,
            "snapshot_pos": runtime.snapshot_pos,
            "queued": worker.queued,
            "upkeep_errors": worker.maintenance_errors,
            "journal": journal,
            **dataclasses.asdict(runtime.counters),
        }

    async def _read(
        self, worker: BankWorker, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None
    ) -> Readout:
        if as_of is None:
            return await worker.read(hidden_QLD, k, start, self._wanted)
        entry = worker.runtime.entry
        point = await worker.beside(lambda: self.past.find(entry, as_of, worker.runtime.nbytes))
        self._space.room.touch(PAST)
        await self._space.make(PAST, self.past.needs(point), stays=entry.name)
        return await worker.beside(lambda: self.past.at(point).read(hidden_QLD, k, start, self._wanted))

    def _wanted(self) -> bool:
        return not self._closing

    def _end_threads(self) -> None:
        self._readers.shutdown()
        self._pool.shutdown()

    async def _thread(self, function: Callable[[], T]) -> T:
        return await self._executor.run(function)
