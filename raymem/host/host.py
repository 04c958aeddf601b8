"""Many banks at work in one process: what a local store and a shard actor both are."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from raymem.bank.erase import erase
from raymem.bank.owner import BankOwner, GroupCommit
from raymem.bank.primary import Executor, Primary, Standing, run_now
from raymem.bank.replica import Replica
from raymem.config import HostSettings, Settings
from raymem.errors import Corrupt, InvalidInput, Moved, NotOwner, Overloaded, RaymemError, StoreClosed, TooLarge
from raymem.host.backend import detached
from raymem.host.lease import Lease, clock
from raymem.host.maintenance import Maintenance
from raymem.host.memory_budget import PAST, MemoryBudget, MemoryLimit
from raymem.host.owed import Owed
from raymem.host.ownership import Locks, Ownership
from raymem.host.point_in_time import PointInTimeCache
from raymem.logs import get_logger
from raymem.rows import AttendedRows, Trace
from raymem.storage.assignment import AssignmentCache
from raymem.storage.store import ColdStore, Entry
from raymem.types import Ack, AttendedExtent, AttendQuery, EraseReceipt, MemoryTokens, Readout, Selection

log = get_logger("raymem.host.host")
_TICK_S = 1.0
# the caller, where one process asks for many: a gateway sets it to the holder of a request's key
caller: ContextVar[str] = ContextVar("caller", default="")


class Limiter:
    """Requests and bytes that each caller has in flight; over the limit a call is refused, never queued."""

    def __init__(self, settings: HostSettings) -> None:
        self._requests = settings.caller_requests
        self._bytes = settings.caller_bytes
        self._in_flight: dict[str, tuple[int, int]] = {}
        self.refused = 0

    @contextmanager
    def admit(self, caller: str, nbytes: int) -> Iterator[None]:
        """Hold a place for one request of `nbytes` while the block runs.

        Raises:
            TooLarge: the request alone is over the byte limit.
            Overloaded: the caller has too much in flight; come back after `retry_after_s`.
        """
        if nbytes > self._bytes:
            raise TooLarge(f"a request of {nbytes} bytes is over the limit of {self._bytes}; send it in pieces")
        requests, held = self._in_flight.get(caller, (0, 0))
        if requests >= self._requests or held + nbytes > self._bytes:
            self.refused += 1
            raise Overloaded(
                f"{requests} requests with {held} bytes are in flight (limits {self._requests} and {self._bytes}); "
                "wait for some to finish",
                retry_after_s=0.05,
            )
        self._in_flight[caller] = (requests + 1, held + nbytes)
        try:
            yield
        finally:
            requests, held = self._in_flight.pop(caller)
            if requests > 1:
                self._in_flight[caller] = (requests - 1, held - nbytes)


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
        self._read_pool = ThreadPoolExecutor(settings.host.threads + 1, thread_name_prefix="raymem-read")
        self._readers = Executor(self._read_pool)
        self._turns = Locks(lambda: asyncio.Semaphore(settings.host.threads))
        self.ownership = Ownership(cold, settings, owner, self._executor, self._drop_all)
        self._ticker: asyncio.TimerHandle | None = None
        self._limiter = Limiter(settings.host)
        self.past = PointInTimeCache(cold, settings.host.past_bytes, device)
        self._owners: dict[str, BankOwner] = {}
        # stopped with a commit under way
        self._stopping: dict[str, BankOwner] = {}
        self._owed = Owed()
        self._closing = False
        self._locks = Locks(asyncio.Lock)
        self._maintenance = Maintenance(
            cold, settings.cold, self.names, lambda name, what: self.erase(name, what, rebuild=True)
        )
        setting = "host.memory_bytes" if device == "cpu" else "host.gpu_memory_bytes"
        self._memory = MemoryBudget(
            cold, MemoryLimit(owner, self.memory_bytes, setting), self._executor, self.held, self._evict
        )

    def has(self, name: str) -> bool:
        """Whether the bank is hot here, and not about to leave. A lease that ran out ends first."""
        if self._owners and clock() >= self.ownership.lease.deadline:
            self.ownership.end("its lease ran out")
        owner = self._owners.get(name)
        return owner is not None and not (owner.stopped or owner.leaving)

    def names(self) -> list[str]:
        """The banks that are hot here."""
        return sorted(self._owners)

    @property
    def memory_bytes(self) -> int | None:
        """What the banks here may take together, None if nothing was set."""
        limits = self.settings.host
        return limits.memory_bytes if self.device == "cpu" else limits.gpu_memory_bytes

    def bytes(self) -> dict[str, int]:
        """Bytes of each hot bank's state."""
        return {name: owner.primary.nbytes for name, owner in self._owners.items()}

    def held(self) -> dict[str, int]:
        """Bytes of everything that counts against `memory_bytes`, least recently used first."""
        loaded = [(primary.used, name, primary.nbytes) for name, primary in self._loaded().items()]
        return {name: size for _, name, size in sorted([*loaded, (self.past.used, PAST, self.past.nbytes)])}

    async def memory(self) -> dict[str, Any]:
        """What is in memory, what stays there, and how often a bank had to leave."""
        return await self._memory.stats() | {"loaded": len(self._owners)}

    async def attach(self, name: str, *, take_from: str | None = None, epoch: int | None = None) -> Entry:
        """Claim a bank in the catalog and load it: snapshot, then the journal's tail; return its line in the catalog.

        Args:
            name: the bank.
            take_from: the only other owner that it may be taken from; by default any.
            epoch: the only one at which it may be: an owner that died may have come back under its name and claimed it.

        Raises:
            Moved: another owner has it.
        """
        async with self._locks[name]:
            entry = (await self._executor.run(self.cold.catalog.get, name)).whole()
            if self.has(name):
                if self._owners[name].primary.entry.id == entry.id:
                    return entry
                # its bank was removed elsewhere, and this is another of that name
                await self._free(name)
            is_later = epoch not in (None, entry.epoch)
            if take_from is not None and (entry.owner not in (None, self.owner, take_from) or is_later):
                raise Moved(f"bank {name!r} is hot on {entry.owner}", to=entry.owner or "")
            return await self._load(entry)

    async def reopen(self, name: str) -> None:
        """Load a bank that the catalog says is hot here: after a restart, or after its owner stopped.

        Raises:
            BankDetached: it is cold.
            Moved: another owner has it; `to` is empty if it is hot without an owner.
        """
        async with self._locks[name]:
            if self.has(name):
                return
            entry = await self._executor.run(self.cold.catalog.get, name)
            if entry.state == "cold":
                raise detached(name)
            if entry.owner != self.owner:
                raise Moved(f"bank {name!r} is not on {self.owner}", to=entry.owner or "")
            await self._load(entry)

    async def detach(self, name: str, state: str = "cold") -> None:
        """Finish queued writes, snapshot, release the bank in the catalog as `state`, free its memory."""
        async with self._locks[name]:
            owner = self._owner(name)
            primary = owner.primary
            away = Moved(f"bank {name!r} is leaving {self.owner}", to="") if state == "hot" else detached(name)
            await owner.finish(primary.rest, away)
            self._owners.pop(name, None)
            epoch, flushed = primary.entry.epoch, None if primary.log is None else primary.log.id
            release = partial(self.cold.catalog.release, name, epoch, state=state, log=flushed)
            await self._executor.run(release)
            if state == "cold":
                await self._depart(owner)

    async def discard(self, name: str) -> None:
        """Free a bank that is about to be removed, at once: nothing is written down, and its rows leave the log."""
        async with self._locks[name]:
            await self._free(name)

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
        owner = self._owner(name)
        if owner.assignments is not None:
            owner = await self._home(name, lambda streams: streams.require(trace.stream))
        # nothing is waited for between this and the queue
        lease, is_limited = self.ownership.lease, self._memory.limit.nbytes is not None
        if is_limited:
            # a bank that is too large even alone takes no more
            self._memory.limit.leaving(name, owner.primary.nbytes, {}, ())
        if durable:
            with self._limiter.admit(caller, trace.nbytes):
                ack = await owner.write(trace)
            if clock() >= lease.deadline:
                raise self._silent(name, lease)
            if is_limited:
                self._memory.watch(name)
            return ack
        with ExitStack() as admitted:
            admitted.enter_context(self._limiter.admit(caller, trace.nbytes))
            trace.validate(owner.primary.spec.fingerprint)
            done = owner.write(trace)
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
        owner, lease, turn = self._owner(name), self.ownership.lease, self._turns[caller]
        with self._limiter.admit(caller, hidden_QLD.nbytes):
            async with turn:
                replica = owner.primary if as_of is None else await self._past_of(owner, as_of)
                try:
                    readout = await self._readers.run(replica.read, hidden_QLD, k, start, self._wanted)
                finally:
                    if owner.primary.standing is Standing.LOST:
                        owner.stop()
        if clock() >= lease.deadline:
            raise self._silent(name, lease)
        return readout

    async def attend(
        self, name: str, query: AttendQuery, *, as_of: str | float | None = None, caller: str = ""
    ) -> MemoryTokens:
        """Choose the rows of a bank, or of what it was, that a model is to attend to; runs beside writers.

        Raises:
            NotOwner: the lease ran out meanwhile, so the answer may be old.
            TooLarge: there is no memory for the states that the rows are chosen by.
        """
        owner, lease, turn = self._owner(name), self.ownership.lease, self._turns[caller]
        with self._limiter.admit(caller, query.nbytes):
            async with turn:
                replica = owner.primary if as_of is None else await self._past_of(owner, as_of)
                if as_of is None and (more := replica.attend_bytes(query)):
                    await self._memory.make(name, replica.nbytes + more)
                try:
                    chosen = await self._readers.run(replica.attend, query, self._wanted)
                finally:
                    if owner.primary.standing is Standing.LOST:
                        owner.stop()
        if clock() >= lease.deadline:
            raise self._silent(name, lease)
        return chosen

    async def put_rows(self, name: str, rows: AttendedRows, *, caller: str = "") -> AttendedExtent:
        """Keep keys and values of rows, after the writes queued so far; see `raymem.storage.attended`.

        Raises:
            Overloaded: the caller has too much in flight. NotOwner: the lease ran out meanwhile; try again.
            InvalidInput, FingerprintMismatch, TooLarge: refused, nothing kept.
            Reassigned: the bank is a partition, and the stream lives in another.
        """
        owner = await self._home(name, lambda streams: streams.require(rows.stream))
        lease = self.ownership.lease
        with self._limiter.admit(caller, rows.nbytes):
            kept = await owner.call(lambda: owner.primary.put_rows(rows, self.settings.cold.attended_bytes))
        if clock() >= lease.deadline:
            raise self._silent(name, lease)
        return kept

    async def mark(self, name: str, tag: str) -> dict[str, int]:
        """Tag a bank's position after the writes queued so far; return all tags."""
        owner = self._owner(name)
        return await owner.call(lambda: owner.primary.mark(tag))

    async def materialise(self, name: str) -> None:
        """Copy what a fork inherited into its own journal; writes wait meanwhile, reads don't."""
        owner = self._owner(name)
        await owner.rewrite(owner.primary.materialise)

    async def erase(self, name: str, what: Selection, rebuild: bool = False) -> EraseReceipt:
        """Erase rows after the writes queued so far; later ones wait; see `raymem.bank.erase`."""
        owner = self._owner(name)
        receipt = await owner.rewrite(lambda: erase(owner.primary, what, rebuild=rebuild))
        # what banks were may hold the rows still, this one's and its forks'
        self.past.forget()
        return receipt

    async def release(self, name: str, stream: str | None) -> None:
        """Finish the writes queued so far, and look up where a stream lives, or any, before later ones."""
        owner = self._owner(name)
        if owner.assignments is not None:
            owner.assignments.release(stream)
        await owner.call(lambda: None)

    async def pull(self, name: str, source: str, stream: str, start: int) -> tuple[int, int]:
        """Copy a stream's rows from another bank's journal, under their own names; those that are there stay.

        Returns:
            How many were new, and the position in that journal up to which all were seen: where to go on.
        """
        lease, copied = self.ownership.lease, 0
        journal = self.cold.journal(await self._executor.run(self.cold.catalog.get, source))
        end = await self._executor.run(journal.end)
        rows = journal.of_stream(stream, start)
        while (part := await self._executor.run(next, rows, None)) is not None:
            owner = await self._home(name, lambda streams: streams.expect(stream))
            acks = await asyncio.gather(*map(owner.write, part.traces()))
            copied += sum(ack.rows for ack in acks)
        await self._pull_attended(name, journal.entry, stream, end)
        if clock() >= lease.deadline:
            raise self._silent(name, lease)
        self._memory.watch(name)
        return copied, end

    async def _pull_attended(self, name: str, source: Entry, stream: str, end: int) -> None:
        """Copy keys and values of a stream's rows before `end` too; those that can't be kept are left to be rebuilt."""
        there = self.cold.attended(self._owner(name).primary.entry)
        kept = self.cold.attended(source).of_stream(stream, end, there)
        while True:
            try:
                if (rows := await self._executor.run(next, kept, None)) is None:
                    return
                owner = await self._home(name, lambda streams: streams.expect(stream))
                put = partial(owner.primary.put_rows, rows, self.settings.cold.attended_bytes)
                await owner.call(put)
            except (Corrupt, InvalidInput) as error:
                # too many, of another format, damaged, or of rows that were erased meanwhile
                log.warning("keys and values left behind", bank=name, reason=error.message)

    async def digest(self, name: str) -> str:
        """sha256 of the bank's whole state, after the writes queued so far."""
        owner, lease = self._owner(name), self.ownership.lease
        digest = await owner.call(owner.primary.digest)
        if clock() >= lease.deadline:
            raise self._silent(name, lease)
        return digest

    async def snapshot(self, name: str) -> int:
        """Snapshot a bank after the writes queued so far; return the position it stands at."""
        owner = self._owner(name)
        return await owner.call(owner.primary.snapshot)

    async def stats(self) -> dict[str, Any]:
        """Counters of this process and of each hot bank."""
        banks = {name: await self._bank_stats(owner) for name, owner in sorted(self._owners.items())}
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
        await self._memory.rest()
        for name in self.names():
            try:
                await self.detach(name, state="hot")
            except RaymemError as error:
                # every row is in the journal already; the next owner replays it
                log.warning("bank not flushed on close", bank=name, error=str(error))
                self._owners.pop(name, None)
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
        # no threads and no event loop any more
        here = Executor()
        for name, traces in self._owed.left().items():
            owner = self._owners.get(name)
            if owner is not None:
                # some may be there, and are then acknowledged as duplicates
                owner.primary.doubt()
                self._owed.resolve(name, run_now(owner.primary.write(traces, here)))
        self._owners.clear()
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
            owner = self._owners.get(name)
            if owner is None or owner.stopped:
                return False
            await owner.finish(owner.primary.rest, Moved(f"bank {name!r} makes room for others just now", to=""))
            self._owners.pop(name, None)
            return True

    async def _load(self, entry: Entry) -> Entry:
        if self._closing:
            raise StoreClosed(f"bank {entry.name!r} is not loaded: this store is closed; connect again")
        self._retire(entry.name)
        if (former := self._stopping.pop(entry.name, None)) is not None:
            # it may have a commit under way, in the log that the next one uses too
            await former.end()
        is_limited = self._memory.limit.nbytes is not None
        if is_limited:
            await self._memory.admit(entry)
        group_commit = await self.ownership.commits()
        run, name, mine = self._executor.run, entry.name, group_commit.log
        claimed = await run(self.ownership.claim, name, entry.epoch, group_commit)
        try:
            primary = await run(Primary.open, self.cold, claimed, self.device, mine)
            if is_limited:
                await self._memory.make(name, primary.nbytes)
        except Exception:
            # a bank that was hot stays so: its next caller hears why it can't be loaded
            if entry.state == "cold":
                await run(partial(self.cold.catalog.release, name, claimed.epoch, log=mine.id))
            raise
        self._serve(name, primary, group_commit)
        return primary.entry

    def _drop_all(self, why: str) -> None:
        """The incarnation is over: other owners may have any of its banks."""
        log.error("incarnation over", owner=self.owner, reason=why, banks=len(self._owners))
        for owner in self._owners.values():
            owner.stop()
        self._owners.clear()

    def _serve(self, name: str, primary: Primary, group_commit: GroupCommit) -> None:
        self.ownership.require_present(name, group_commit)
        self._owners[name] = BankOwner(primary, self._executor, group_commit, self.settings)
        if self._ticker is None:
            self._maintenance.start()
            self._tick()

    def _tick(self) -> None:
        """Flush what lies in the log for long and save what lies unsaved, also of banks that take no writes."""
        self._ticker = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        for owner in self._owners.values():
            owner.nudge()
        if self.ownership.group_commit is not None:
            held = self.ownership.group_commit.log
            if held.left:
                # an earlier try failed
                self.ownership.group_commit.tidy()
            oldest = set(held.oldest(held.nbytes - held.limit // 2))
            for owner in self._owners.values():
                if owner.primary.entry.id in oldest:
                    owner.nudge(flush=True)

    async def _depart(self, owner: BankOwner) -> None:
        """A bank that was flushed here goes elsewhere: what is erased there must not stay in this host's log."""
        owner.group_commit.log.leave(owner.primary.entry.id)
        await asyncio.shield(owner.group_commit.tidy())

    def _owner(self, name: str) -> BankOwner:
        """The bank's owner, which is used now; one that is leaving refuses. As `has`, it looks at the lease."""
        if self._owners and clock() >= self.ownership.lease.deadline:
            self.ownership.end("its lease ran out")
        owner = self._owners.get(name)
        if owner is not None and owner.stopped:
            self._retire(name)
            owner = None
        if owner is None:
            raise Moved(f"bank {name!r} is not hot on {self.owner}", to="")
        owner.primary.used = time.monotonic()
        return owner

    async def _free(self, name: str) -> None:
        self._retire(name)
        owner = self._owners.pop(name, None) or self._stopping.pop(name, None)
        if owner is None:
            return
        owner.stop()
        await owner.end()
        bank = owner.primary.entry.id
        await self._executor.run(self.cold.catalog.disown, bank, self.owner)
        owner.group_commit.log.forget(bank)
        await self._depart(owner)

    def _retire(self, name: str) -> None:
        """Take a bank out whose owner has stopped, and keep that for as long as a commit of it is under way."""
        owner = self._owners.get(name)
        if owner is not None and owner.stopped:
            del self._owners[name]
            if not owner.ended:
                self._stopping[name] = owner

    def _silent(self, name: str, lease: Lease) -> NotOwner:
        """Why an outcome is refused after the lease ran out: another owner may not know it, or have made it old."""
        if lease is self.ownership.lease:
            self.ownership.end("its lease ran out")
        return NotOwner(
            f"{self.owner} was silent for longer than its lease of {lease.lease_s:g} s, so bank {name!r} may have "
            "another owner: ask again, repeating a write is safe"
        )

    async def _home(self, name: str, check: Callable[[AssignmentCache], Awaitable[None]]) -> BankOwner:
        """The bank's owner, once its partition may take the rows; a check that takes time may find another."""
        while True:
            owner = self._owner(name)
            if owner.assignments is not None:
                await check(owner.assignments)
            if owner is self._owner(name):
                return owner

    async def _bank_stats(self, owner: BankOwner) -> dict[str, Any]:
        primary = owner.primary
        return {
            "kind": primary.spec.kind,
            "rows": primary.end,
            "bytes": primary.nbytes,
            "budget_bytes": primary.spec.budget_bytes,
            "epoch": primary.entry.epoch,
            "snapshot_pos": primary.snapshot_pos,
            "queued": owner.queued,
            "upkeep_errors": owner.maintenance_errors,
            "journal": await self._executor.run(primary.journal.stats),
            **dataclasses.asdict(primary.counters),
        }

    async def _past_of(self, owner: BankOwner, as_of: str | float) -> Replica:
        """The bank as it was, once there is room for it."""
        entry = owner.primary.entry
        point = await self._readers.run(self.past.find, entry, as_of, owner.primary.nbytes)
        self.past.used = time.monotonic()
        await self._memory.make(PAST, self.past.needs(point), stays=entry.name)
        return await self._readers.run(self.past.at, point)

    def _loaded(self) -> dict[str, Primary]:
        return {name: owner.primary for name, owner in self._owners.items()}

    def _wanted(self) -> bool:
        return not self._closing

    def _end_threads(self) -> None:
        self._read_pool.shutdown()
        self._pool.shutdown()
