"""Many banks at work in one process: what a local store and a shard actor both are."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog
from torch import Tensor

from raymem.backend import detached
from raymem.cold.log import Log
from raymem.cold.store import ColdStore, Entry
from raymem.committer import Committer
from raymem.config import Settings
from raymem.crew import Crew
from raymem.erasing import erase
from raymem.errors import Moved, NotOwner, RaymemError
from raymem.homes import Homes
from raymem.lease import Lease
from raymem.limits import Limiter
from raymem.past import Past
from raymem.room import Room
from raymem.runtime import Runtime
from raymem.types import Ack, EraseReceipt, Readout, Selection, Trace
from raymem.upkeep import Upkeep
from raymem.wire import traces_of
from raymem.worker import BankWorker

T = TypeVar("T")
log = structlog.get_logger("raymem.host")
_TICK_S = 1.0
# a source that moves a bank comes back for its copy at once
_ARRIVAL_S = 60.0


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
        self._crew = Crew(self._pool)
        self._committer: Committer | None = None
        self._opening = asyncio.Lock()
        self._ticker: asyncio.TimerHandle | None = None
        self._limiter = Limiter(settings.host)
        self.past = Past(cold, settings.host.past_bytes, device)
        self._workers: dict[str, BankWorker] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._moved: dict[str, str] = {}
        self._arriving: dict[str, Runtime] = {}
        self._upkeep = Upkeep(cold, settings.cold, self.names, lambda name, what: self.erase(name, what, rebuild=True))
        self._expiring: dict[str, asyncio.TimerHandle] = {}
        self._lease = self._new_lease()
        setting = "host.memory_bytes" if device == "cpu" else "host.gpu_memory_bytes"
        self._room = Room(owner, self.memory_bytes, setting)
        self._making_room = asyncio.Lock()
        self._growing: asyncio.Task[None] | None = None

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

    async def memory(self) -> dict[str, Any]:
        """What is in memory, what stays there, and how often a bank had to leave."""
        loaded, pinned = self.bytes(), await self._thread(self._pinned)
        return {
            "limit_bytes": self.memory_bytes,
            "loaded": len(loaded),
            "bytes": sum(loaded.values()),
            "pinned_bytes": sum(size for name, size in loaded.items() if name in pinned),
            "evicted": self._room.evicted,
            "arriving": len(self._arriving),
        }

    async def attach(self, name: str, *, take_from: str | None = None) -> None:
        """Claim a bank in the catalog and load it: snapshot, then the journal's tail.

        Args:
            name: the bank.
            take_from: the only other owner that it may be taken from; by default whoever has it.

        Raises:
            Moved: another owner has it.
        """
        async with self._locks[name]:
            if self.has(name):
                return
            entry = (await self._thread(lambda: self.cold.catalog.get(name))).whole()
            if take_from is not None and entry.owner not in (None, self.owner, take_from):
                raise Moved(f"bank {name!r} is hot on {entry.owner}", to=entry.owner)
            await self._load(entry)

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
            worker = self._writable(name)
            runtime = worker.runtime
            away = Moved(f"bank {name!r} is leaving {self.owner}", to="") if state == "hot" else detached(name)
            await worker.finish(runtime.rest, away)
            self._workers.pop(name)
            epoch, settled = runtime.entry.epoch, None if runtime.log is None else runtime.log.id
            await self._thread(lambda: self.cold.catalog.release(name, epoch, state=state, log=settled))

    async def write(self, name: str, trace: Trace, *, durable: bool = True, caller: str = "") -> Ack:
        """Journal and apply a trace.

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
        worker, lease = await self._home(name, lambda homes: homes.require(trace.stream)), self._lease
        self._room.leaving(name, worker.runtime.nbytes, {}, ())
        if durable:
            with self._limiter.admit(caller, trace.nbytes):
                ack = await worker.write(trace)
            self._confirm(name, lease)
            self._watch_growth(name)
            return ack
        trace.validate(worker.runtime.spec.fingerprint)
        admitted = self._limiter.admit(caller, trace.nbytes)
        admitted.__enter__()
        worker.write(trace).add_done_callback(lambda done: self._finish_later(name, admitted, done))
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
        """
        worker, lease = self._worker(name), self._lease
        with self._limiter.admit(caller, hidden_QLD.nbytes):
            if as_of is None:
                readout = await worker.read(hidden_QLD, k, start)
            else:
                bank = worker.runtime.entry
                readout = await worker.beside(lambda: self.past.at(bank, as_of).read(hidden_QLD, k, start))
        self._confirm(name, lease)
        return readout

    async def mark(self, name: str, tag: str) -> dict[str, int]:
        """Tag a bank's position after the writes queued so far; return all tags."""
        worker = self._writable(name)
        return await worker.call(lambda: worker.runtime.mark(tag))

    async def materialise(self, name: str) -> None:
        """Copy what a fork inherited into its own journal; writes wait meanwhile, reads don't."""
        worker = self._writable(name)
        await worker.call(worker.runtime.materialise)

    async def erase(self, name: str, what: Selection, *, rebuild: bool = False) -> EraseReceipt:
        """Erase rows after the writes queued so far; later ones wait; see `raymem.erasing`."""
        worker = self._writable(name)
        receipt = await worker.call(lambda: erase(worker.runtime, what, rebuild=rebuild))
        # what banks were may hold the rows still, this one's and its forks'
        self.past.forget()
        return receipt

    async def release(self, name: str, stream: str | None) -> None:
        """Finish the writes queued so far, and look up where a stream lives, or any, before later ones."""
        worker = self._writable(name)
        worker.homes.release(stream)
        await worker.call(lambda: None)

    async def pull(self, name: str, source: str, stream: str, start: int) -> tuple[int, int]:
        """Copy a stream's rows from another bank's journal, under their own names; those that are there stay.

        Returns:
            How many were new, and the position in that journal up to which all were seen: where to go on.
        """
        lease, copied = self._lease, 0
        journal = self.cold.journal(await self._thread(lambda: self.cold.catalog.get(source)))
        end = await self._thread(journal.end)
        rows = journal.of_stream(stream, start)
        while (part := await self._thread(lambda: next(rows, None))) is not None:
            worker = await self._home(name, lambda homes: homes.expect(stream))
            acks = await asyncio.gather(*map(worker.write, traces_of(part)))
            copied += sum(ack.rows for ack in acks)
        self._confirm(name, lease)
        self._watch_growth(name)
        return copied, end

    async def digest(self, name: str) -> str:
        """sha256 of the bank's whole state, after the writes queued so far."""
        worker, lease = self._worker(name), self._lease
        digest = await worker.call(worker.runtime.digest)
        self._confirm(name, lease)
        return digest

    async def snapshot(self, name: str) -> int:
        """Snapshot a bank after the writes queued so far; return the position it stands at."""
        worker = self._worker(name)
        return await worker.call(worker.runtime.snapshot)

    async def stats(self) -> dict[str, Any]:
        """Counters of this process and of each hot bank."""
        banks = {name: await self._bank_stats(worker) for name, worker in sorted(self._workers.items())}
        about = {"owner": self.owner, "device": self.device, "refused_overload": self._limiter.refused}
        about |= {"memory": await self.memory(), "log": self._committer.stats() if self._committer else {}}
        return about | {"banks": banks}

    async def close(self) -> None:
        """Snapshot and release every bank; they stay attached in the catalog and load on next use."""
        self._upkeep.stop()
        if self._growing is not None:
            await self._growing
        for name in self.names():
            try:
                await self.detach(name, state="hot")
            except RaymemError as error:
                # every row is in the journal already; the next owner replays it
                log.warning("bank not settled on close", bank=name, error=str(error))
                self._workers.pop(name, None)
        if self._ticker is not None:
            self._ticker.cancel()
        try:
            await asyncio.to_thread(self._leave)
        except RaymemError as error:
            # it runs out by itself
            log.warning("lease not released", owner=self.owner, error=str(error))
        self._pool.shutdown(wait=True)

    async def prepare(self, name: str) -> int:
        """Migration, at the target: copy a snapshot and the tail while the source still serves; return the position."""
        async with self._locks[name]:
            runtime = self._arriving.get(name)
            if runtime is None:
                entry = await self._thread(lambda: self.cold.catalog.get(name))
                # before anything moves
                await self._make_room(name, await self._thread(lambda: self._size(entry)))
                runtime = await self._thread(lambda: Runtime(self.cold, entry, device=self.device))
                await self._thread(runtime.recover)
                self._arriving[name] = runtime
            else:
                self._expiring[name].cancel()
                await self._thread(runtime.catch_up)
            # a source that dies half-way tells nobody: its copy must not stay for good
            self._expiring[name] = asyncio.get_running_loop().call_later(_ARRIVAL_S, self.abandon, name, runtime)
            return runtime.pos

    async def yield_writes(self, name: str, to: str) -> int:
        """Migration, at the source: finish queued writes, answer later ones with Moved, go on answering reads.

        The catalog names the source as the owner until the target has claimed the bank: if either dies in between,
        one owner is left. Returns the epoch to claim it from.
        """
        worker, lease = self._writable(name), self._lease
        self._moved[name] = to
        try:
            await worker.call(worker.runtime.let_go)
            self._confirm(name, lease)
        except Exception:
            self._moved.pop(name, None)
            raise
        return worker.runtime.entry.epoch

    async def adopt(self, name: str, epoch: int) -> int:
        """Migration, at the target: claim the prepared bank, apply the last of its tail and serve it.

        Raises:
            NotOwner: the source that yielded at `epoch` no longer owns the bank.
        """
        async with self._locks[name]:
            committer = await self._commits()
            entry = await self._thread(lambda: self._claim(name, epoch, committer))
            runtime = self._arriving.pop(name, None)
            if runtime is None:
                runtime = await self._thread(lambda: self._open(entry, committer.log))
            else:
                runtime.log = committer.log
                await self._thread(lambda: runtime.own(entry))
            self._serve(name, runtime, committer)
            return runtime.pos

    async def resume(self, name: str) -> None:
        """Migration, at the source: the target failed, so take the bank back."""
        worker = self._worker(name)
        try:
            committer = await self._commits()
            entry = await self._thread(lambda: self._claim(name, self.cold.catalog.get(name).epoch, committer))
            await worker.call(lambda: worker.runtime.own(entry))
            worker.homes.release(None)
        except Exception:
            # whoever the catalog names now has the bank: a fresh start tells
            self._workers.pop(name, None)
            raise
        finally:
            self._moved.pop(name, None)

    async def forget_moved(self, name: str) -> None:
        """Migration, at the source: the target serves, so free the bank; the catalog tells stragglers where it is."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            await worker.finish(lambda: None, Moved(f"bank {name!r} has moved", to=self._moved.get(name, "")))
        self._moved.pop(name, None)

    def abandon(self, name: str, runtime: Runtime | None = None) -> None:
        """Migration, at the target: drop what was prepared; if `runtime` is named, only that."""
        if runtime in (None, self._arriving.get(name)):
            self._arriving.pop(name, None)

    async def _make_room(self, name: str, needed: int) -> int:
        """Free banks that were not used for longest, so that this one has room; return how many left.

        Raises:
            TooLarge: even so it would have none.
        """
        if self.memory_bytes is None:
            return 0
        async with self._making_room:
            before, pinned = self._room.evicted, await self._thread(self._pinned)
            for other in self._room.leaving(name, needed, self.bytes(), pinned):
                await self._evict(other)
            return self._room.evicted - before

    async def _evict(self, name: str) -> None:
        """Take a bank out of memory; it stays this owner's, and loads again at its next use."""
        # one that is being attached, moved or detached is not waited for: that might need room itself
        if self._locks[name].locked() or name in self._moved:
            return
        async with self._locks[name]:
            worker = self._workers.get(name)
            if worker is None or worker.lost:
                return
            await worker.finish(worker.runtime.rest, Moved(f"bank {name!r} makes room for others just now", to=""))
            self._workers.pop(name)
            self._room.forget(name)
            self._room.evicted += 1

    async def _keep_room(self, name: str) -> None:
        try:
            # others may grow meanwhile
            while await self._make_room(name, self.bytes().get(name, 0)) and self._room.is_short(self.bytes()):
                continue
        except RaymemError as error:
            # its next write hears why
            log.warning("no room made", owner=self.owner, bank=name, error=str(error))

    def _pinned(self) -> set[str]:
        return {entry.name for entry in self.cold.catalog.list() if entry.pinned}

    def _size(self, entry: Entry) -> int:
        """About how many bytes a bank takes in memory, before it is loaded."""
        known = self.cold.snapshots(entry).nbytes() or self.cold.journal(entry).stats()["bytes"]
        return min(entry.spec.budget_bytes, known)

    async def _load(self, entry: Entry) -> None:
        if self.memory_bytes is not None:
            await self._make_room(entry.name, await self._thread(lambda: self._size(entry)))
        committer = await self._commits()
        claimed = await self._thread(lambda: self._claim(entry.name, entry.epoch, committer))
        try:
            runtime = await self._thread(lambda: self._open(claimed, committer.log))
            await self._make_room(entry.name, runtime.nbytes)
        except Exception:
            # a bank that was hot stays so: whoever uses it next hears why it can't be loaded
            if entry.state == "cold":
                mine = committer.log.id
                await self._thread(lambda: self.cold.catalog.release(entry.name, claimed.epoch, log=mine))
            raise
        self._serve(entry.name, runtime, committer)

    def _new_lease(self) -> Lease:
        return Lease(self.cold.incarnations, self.owner, self.settings.host.lease_s)

    def _check_lease(self) -> None:
        if self._workers and not self._lease.valid:
            self._demote("its lease ran out")

    def _confirm(self, name: str, lease: Lease) -> None:
        """Refuse an outcome that another owner may know nothing of, or that one has made old."""
        if lease.valid:
            return
        if lease is self._lease:
            self._demote("its lease ran out")
        raise NotOwner(
            f"{self.owner} was silent for longer than its lease of {lease.lease_s:g} s, so bank {name!r} may have "
            "another owner: ask again, repeating a write is safe"
        )

    def _demote(self, why: str) -> None:
        """Give up every bank: a new incarnation claims those again that the catalog still says are here."""
        log.error("incarnation over", owner=self.owner, reason=why, banks=len(self._workers))
        for worker in self._workers.values():
            worker.give_up()
        self._workers.clear()
        self._moved.clear()
        self._lease.give_up()
        self._lease = self._new_lease()

    def _claim(self, name: str, epoch: int, committer: Committer) -> Entry:
        self._lease.hold()
        self._require_same(name, committer)
        return self.cold.catalog.claim(name, self.owner, epoch, committer.log.id)

    def _watch_growth(self, name: str) -> None:
        if self._room.is_short(self.bytes()) and (self._growing is None or self._growing.done()):
            self._growing = asyncio.create_task(self._keep_room(name))

    def _require_same(self, name: str, committer: Committer) -> None:
        if committer.log.id != self._lease.id:
            raise Moved(f"bank {name!r} is being reopened: its owner began anew meanwhile", to="")

    def _open(self, entry: Entry, log: Log) -> Runtime:
        return Runtime.open(self.cold, entry, device=self.device, log=log)

    def _serve(self, name: str, runtime: Runtime, committer: Committer) -> None:
        self._require_same(name, committer)
        self._arriving.pop(name, None)
        self._moved.pop(name, None)
        self._workers[name] = BankWorker(runtime, self._crew, committer, self.settings)
        self._upkeep.start()
        if self._ticker is None:
            self._tick()

    async def _commits(self) -> Committer:
        """The committer of this incarnation's log."""
        async with self._opening:
            lease = self._lease
            if self._committer is None or self._committer.log.id != lease.id:
                made = Log(self.cold.tables, lease.id, self.settings.cold.log_bytes)
                # a log whose incarnation is unknown may be swept away
                await self._thread(lease.hold)
                await self._thread(made.create)
                size = self.settings.host.group_bytes
                self._committer = Committer(made, self._crew, size, lambda: self._fenced(lease))
            return self._committer

    def _fenced(self, lease: Lease) -> None:
        """A bank was taken from this incarnation, and its log with it: no bank can be written through it any more."""
        if lease is self._lease:
            self._demote("its log was fenced off")

    def _tick(self) -> None:
        """See to banks that nobody writes to: what lies in the log for long settles, what lies unsaved is saved."""
        self._ticker = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        for worker in self._workers.values():
            worker.nudge()
        if self._committer is not None:
            held = self._committer.log
            oldest = set(held.oldest(held.nbytes() - held.limit // 2))
            for worker in self._workers.values():
                if worker.runtime.entry.id in oldest:
                    worker.nudge(settle=True)

    def _leave(self) -> None:
        last = self._committer.log if self._committer else None
        if last is not None and not last.lost and not self.cold.catalog.logged(last.id):
            last.drop()
        self._lease.release()

    def _worker(self, name: str) -> BankWorker:
        self._check_lease()
        worker = self._workers.get(name)
        if worker is not None and worker.lost:
            del self._workers[name]
            worker = None
        self._room.touch(name)
        if worker is None:
            raise Moved(f"bank {name!r} is not hot on {self.owner}", to=self._moved.get(name, ""))
        return worker

    def _writable(self, name: str) -> BankWorker:
        worker = self._worker(name)
        if name in self._moved:
            raise Moved(f"bank {name!r} is moving to {self._moved[name]}", to=self._moved[name])
        return worker

    async def _home(self, name: str, check: Callable[[Homes], Awaitable[None]]) -> BankWorker:
        """The bank's worker, once its partition may take the rows; a check that takes time may find another."""
        while True:
            worker = self._writable(name)
            await check(worker.homes)
            if worker is self._writable(name):
                return worker

    def _finish_later(self, name: str, admitted: Any, done: asyncio.Future[Ack]) -> None:
        admitted.__exit__(None, None, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.warning("a write that was not waited for failed", bank=name, error=str(error))

    async def _bank_stats(self, worker: BankWorker) -> dict[str, Any]:
        runtime = worker.runtime
        journal = await self._thread(runtime.journal.stats)
        return {
            "kind": runtime.spec.kind,
            "rows": runtime.pos,
            "bytes": runtime.nbytes,
            "budget_bytes": runtime.spec.budget_bytes,
            "epoch": runtime.entry.epoch,
            "snapshot_pos": runtime.snapshot_pos,
            "queued": worker.queued,
            "upkeep_errors": worker.upkeep_errors,
            "journal": journal,
            **dataclasses.asdict(runtime.counters),
        }

    async def _thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)
