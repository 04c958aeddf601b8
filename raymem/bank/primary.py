"""The replica that also writes its bank's journal.

A write has one path: `Primary.prepare` decides which rows are new, a commit makes these durable, `Primary.apply` gives
them to the state and returns the outcomes. `Primary.write` is the one place that does the three, for every size.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

from torch import Tensor

from raymem.bank.replica import Replica, Wanted
from raymem.errors import RaymemError, SequenceConflict, StoreClosed
from raymem.logs import get_logger
from raymem.rows import AttendedRows, JournalRows, Trace, concat
from raymem.storage.attended import Attended
from raymem.storage.history import materialise
from raymem.storage.journal.log import Log, Part
from raymem.storage.store import ColdStore, Entry
from raymem.types import Ack, AttendedExtent, AttendQuery, MemoryTokens, Readout

# a write of so few bytes takes less time than a hop to a thread, and is applied together with others
SMALL_BYTES = 64 * 2**10
# applying so many takes about twice as long as applying one
_MOST_ROWS = 64
# a bank without readers is brought up to date after so long, so that its next reader need not wait
_MOST_S = 10.0
Run = tuple[str, str]
log = get_logger("raymem.bank.primary")
T = TypeVar("T")
Args = TypeVarTuple("Args")


class Standing(Enum):
    """What a primary knows of its bank.

    READY: its state and the rows in its apply queue are the journal, whose only writer it is as far as it knows.
    IN_DOUBT: the journal may be other than it knows, as no owner is fenced off yet, a commit failed, or it has let go.
    Reads are sound. The next write takes the journal back first, and is refused where another owner has it.
    LOST: its state may be none that the journal gives, as applying rows failed. For good: only a fresh one is sound.
    """

    READY = auto()
    IN_DOUBT = auto()
    LOST = auto()


@dataclass
class BankCounters:
    """What has happened to a bank since it was opened, in rows unless named otherwise."""

    rows_written: int = 0
    duplicates: int = 0
    gaps: int = 0
    commits: int = 0
    reads: int = 0
    queries: int = 0
    attends: int = 0
    refused: int = 0


@dataclass(frozen=True)
class PendingCommit:
    """A group of traces before its commit: each one's Ack or refusal, its new rows, whether the log takes them."""

    outcomes: list[Ack | RaymemError]
    rows: JournalRows | None = None
    logged: bool = False


@dataclass
class _Group:
    """What `prepare` has found new so far: where the next row goes, the rows, the next seq of each of their runs."""

    end: int
    parts: list[JournalRows] = field(default_factory=list)
    heads: dict[Run, int] = field(default_factory=dict)


class Waiting(NamedTuple):
    """Parts that wait, the next seq of each run in them, their rows and bytes, and the position after the last."""

    parts: tuple[JournalRows, ...] = ()
    heads: Mapping[tuple[str, str], int] = MappingProxyType({})
    rows: int = 0
    nbytes: int = 0
    end: int | None = None
    since: float = 0.0


class ApplyQueue:
    """Small groups of committed rows of one bank, in order.

    One thread adds; any may look at `waiting`, and any may apply. A run's next seq is known here until the state knows
    it. `waiting` is replaced whole, so that a look sees all of a change or nothing.
    """

    def __init__(self) -> None:
        self.waiting = Waiting()
        self._changing = threading.Lock()
        # one applies at a time, and others may look and add meanwhile
        self._applying = threading.Lock()

    def add(self, rows: JournalRows) -> None:
        """Take rows that follow those that are here."""
        runs = zip(rows.streams, rows.runs, strict=True)
        heads = dict(zip(runs, (rows.seq_T + 1).tolist(), strict=True))
        with self._changing:
            now = self.waiting
            self.waiting = Waiting(
                parts=(*now.parts, rows),
                heads={**now.heads, **heads},
                rows=now.rows + len(rows),
                nbytes=now.nbytes + rows.nbytes,
                end=int(rows.pos_T[-1]) + 1,
                since=now.since if now.parts else time.monotonic(),
            )

    @property
    def due(self) -> bool:
        """Whether to apply them although nothing is read."""
        now = self.waiting
        full = now.rows >= _MOST_ROWS or now.nbytes >= SMALL_BYTES
        return bool(now.parts) and (full or time.monotonic() - now.since >= _MOST_S)

    def apply(self, function: Callable[[JournalRows], None]) -> None:
        """Let `function` apply all that are here; other callers wait for it meanwhile. If it fails they stay."""
        with self._applying:
            parts = self.waiting.parts
            if parts:
                function(concat(parts))
                self._drop(len(parts))

    def clear(self) -> None:
        """Drop them: another state has them already."""
        with self._applying:
            self._drop(len(self.waiting.parts))

    def _drop(self, parts: int) -> None:
        with self._changing:
            left = ApplyQueue()
            for rows in self.waiting.parts[parts:]:
                left.add(rows)
            self.waiting = left.waiting


class Executor:
    """A thread pool for what takes longer than the hop there and back, about 100 µs.

    Args:
        pool: the threads; without any, functions run where they are called.
    """

    def __init__(self, pool: ThreadPoolExecutor | None = None) -> None:
        self._pool = pool

    async def run(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """Run a function in a thread.

        Raises:
            StoreClosed: there are no threads any more.
        """
        if self._pool is None:
            return function(*args)
        try:
            done = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        except RuntimeError as error:
            raise StoreClosed(f"this store is closed, or its process ends ({error}); connect again") from error
        return await done


def run_now(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that never waits: for callers without an event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise AssertionError("it waits for something")


class Primary(Replica):
    """A replica that also writes the journal; see `Standing`.

    One thread at a time changes it; reads go on meanwhile. Rows are journaled first and applied after: large groups at
    once, small ones together, at the latest before a read. A read waits for an application, never for a commit.
    """

    def __init__(self, cold: ColdStore, entry: Entry, device: str = "cpu", log: Log | None = None) -> None:
        super().__init__(cold, entry, device)
        self.standing = Standing.IN_DOUBT
        self.counters = BankCounters()
        self.log = log
        # when it was last used, by the monotonic clock
        self.used = 0.0
        self.unsaved_bytes = 0
        self.unsaved_since: float | None = None
        self.apply_queue = ApplyQueue()
        self._attended: Attended | None = None
        self._entering = threading.Lock()

    @classmethod
    def open(cls, cold: ColdStore, entry: Entry, device: str = "cpu", log: Log | None = None) -> Primary:
        """The recovered primary of a bank that this process owns."""
        primary = cls(cold, entry, device, log)
        with ThreadPoolExecutor(1, thread_name_prefix="raymem-fence") as beside:
            # a fence waits for the disk most of the time
            fenced = beside.submit(primary.journal.claim, entry, log)
            primary.load()
            fenced.result()
        primary._follow()
        return primary

    def own(self, entry: Entry) -> None:
        """Take the journal over under a newly claimed entry: fence off earlier owners, then apply what they added."""
        self.doubt()
        self.apply_queued()
        if entry.generation != self.journal.entry.generation:
            self.journal = self.cold.journal(entry)
        self.journal.claim(entry, self.log)
        self._follow()

    def become(self, replica: Replica, entry: Entry) -> None:
        """Go on with the state that `replica` made, under an entry whose journal was rewritten."""
        self.apply_queue.clear()
        with self.lock:
            self.encoder, self.state = replica.encoder, replica.state
            self.pos, self.snapshot_pos = replica.pos, replica.snapshot_pos
        with self._holding:
            # with the rows that are gone
            self._held, self.held_bytes = {}, 0
        self.unsaved_bytes = 0
        self.own(entry)

    def doubt(self) -> None:
        """The journal may be other than is known here."""
        self._enter(Standing.IN_DOUBT)

    async def write(
        self, traces: Sequence[Trace], executor: Executor, commit: Callable[[Part], Awaitable[None]] | None = None
    ) -> list[Ack | RaymemError]:
        """Journal the new rows of all traces in one commit, then apply them.

        Args:
            traces: a group.
            executor: where to do what takes longer than the hop there.
            commit: the group commit of the host's log, for rows that belong there; without it all go to the bank's own
                table.

        Returns:
            For each trace its Ack, or the error that refused it; a refused trace changes nothing and does not keep
            the others back. When the commit fails, no trace is acknowledged.
        """
        small = sum(trace.nbytes for trace in traces) <= SMALL_BYTES and self._at_hand(traces)
        pending = self.prepare(traces) if small else await executor.run(self.prepare, traces)
        rows = pending.rows
        # vectors that came narrow are kept as float32
        small = small and (rows is None or rows.nbytes <= SMALL_BYTES)
        try:
            if rows is not None and pending.logged and commit is not None:
                await commit((self.entry, rows))
            elif rows is not None:
                await executor.run(self.journal.append, rows)
        except RaymemError as error:
            # some of a failed commit may be in the journal all the same
            pending = self._refuse(traces, error)
        return self.apply(pending) if small else await executor.run(self.apply, pending)

    def prepare(self, traces: Sequence[Trace]) -> PendingCommit:
        """Check a group of traces and decide which of their rows are new; nothing is changed yet."""
        try:
            if self.standing is not Standing.READY:
                self.own(self.entry)
            group = _Group(self.apply_queue.waiting.end or self.pos)
            outcomes = [self._dedup(trace, group) for trace in traces]
            rows = None if not group.parts else group.parts[0] if len(group.parts) == 1 else concat(group.parts)
            return PendingCommit(outcomes, rows, rows is not None and self.journal.accept(rows))
        except RaymemError as error:
            return self._refuse(traces, error)

    def apply(self, pending: PendingCommit) -> list[Ack | RaymemError]:
        """Apply what was committed, or queue it where it is small; return the outcomes.

        Raises:
            RaymemError: the primary is lost; what was committed stays in the journal.
        """
        rows = pending.rows
        if rows is not None:
            if rows.nbytes <= SMALL_BYTES:
                self.apply_queue.add(rows)
            else:
                self.apply_queued()
                self._replay_or_lose(rows)
            self.counters.commits += 1
            self.unsaved_bytes += rows.nbytes
            self.unsaved_since = self.unsaved_since or time.monotonic()
        for outcome in pending.outcomes:
            if isinstance(outcome, Ack):
                self.counters.rows_written += outcome.rows
                self.counters.duplicates += outcome.duplicates
                self.counters.gaps += outcome.gaps
            else:
                self.counters.refused += 1
        return pending.outcomes

    def apply_queued(self) -> None:
        """Apply what is committed and waits.

        Raises:
            RaymemError: the primary is lost; nothing that was acknowledged is.
        """
        if self.standing is Standing.LOST:
            raise self._unsound("it failed before")
        if self.apply_queue.waiting.parts:
            self.apply_queue.apply(self._replay_or_lose)

    @property
    def nbytes(self) -> int:
        """Bytes of the mechanism's state, of the rows that wait for it, and of the states that choosing compares."""
        return self.memory.nbytes(self.state) + self.apply_queue.waiting.nbytes + self.held_bytes

    @property
    def end(self) -> int:
        """The position after the last row committed, as this owner knows it."""
        return self.apply_queue.waiting.end or self.pos

    def let_go(self) -> None:
        """Before a handover or a rewriting: flush every row. The next write takes the journal back, if it may."""
        self.doubt()
        self.journal.let_go()

    def read(self, hidden_QLD: Tensor, k: int = 32, start: int = 1, wanted: Wanted = lambda: True) -> Readout:
        """As `Replica.read`, of all that is committed; counted."""
        self.apply_queued()
        readout = super().read(hidden_QLD, k, start, wanted)
        self.counters.reads += 1
        self.counters.queries += len(hidden_QLD)
        return readout

    def attend(self, query: AttendQuery, wanted: Wanted = lambda: True) -> MemoryTokens:
        """As `Replica.attend`, of all that is committed; counted."""
        self.apply_queued()
        chosen = super().attend(query, wanted)
        self.counters.attends += 1
        return chosen

    def put_rows(self, rows: AttendedRows, most_bytes: int) -> AttendedExtent:
        """Keep keys and values of rows that are in the journal; see `Attended.put`."""
        if self._attended is None or self._attended.entry != self.entry:
            # it remembers which files are synced
            self._attended = self.cold.attended(self.entry)
        there = self.journal.positions(rows.stream, rows.run, rows.seq, rows.seq + len(rows))
        return self._attended.put(rows, there, most_bytes)

    def digest(self) -> str:
        """As `Replica.digest`, of all that is committed."""
        self.apply_queued()
        return super().digest()

    def rest(self) -> int:
        """Flush every row and snapshot: what a bank does before it is cold; return the position it stands at.

        A state that can't be written down is made anew from the rows when the bank is loaded.
        """
        self.journal.flush()
        try:
            return self.snapshot()
        except RaymemError as error:
            log.warning("bank rests without a snapshot", bank=self.entry.name, reason=error.message)
            return self.end

    def snapshot(self) -> int:
        """Write the whole state to the cold store; return the position it stands at."""
        self.apply_queued()
        if self.pos > self.snapshot_pos:
            self.save()
        self.unsaved_bytes = 0
        self.unsaved_since = None
        return self.pos

    def mark(self, tag: str) -> dict[str, int]:
        """Tag the present position; return all tags. A bounded state can't be wound back, so it is kept there."""
        if not self.memory.keeps_rows:
            self.snapshot()
        self.cold.catalog.tag(self.entry.name, tag, self.end)
        return self.cold.catalog.tags(self.entry.name)

    def materialise(self) -> None:
        """Copy the rows that a fork inherited into its own journal."""
        self.let_go()
        self.own(materialise(self.cold, self.entry))

    def _at_hand(self, traces: Sequence[Trace]) -> bool:
        """Whether `prepare` needs no look into the store for these traces, and so takes no time worth a thread."""
        if self.standing is not Standing.READY or not self.journal.ready:
            return False
        heads: dict[Run, int] = {}
        for trace in traces:
            run, head = self._head(trace)
            if trace.seq < heads.get(run, head):
                return False
            heads[run] = trace.seq + len(trace)
        return True

    def _head(self, trace: Trace) -> tuple[Run, int]:
        """The name under which rows of a trace's run are there, in whatever Unicode form, and the seq that follows."""
        run = trace.stream, trace.run
        # first those that wait: applied rows leave the queue once the encoder knows them
        if head := self.apply_queue.waiting.heads.get(run):
            return run, head
        run = self.encoder.spelling(*run)
        return run, self.apply_queue.waiting.heads.get(run) or self.encoder.next_seq(*run)

    def _dedup(self, trace: Trace, group: _Group) -> Ack | RaymemError:
        """Add a trace's new rows to a group; return the Ack it gets once that is committed, or why it is refused.

        A row's identity is (stream, run, seq). Rows already there with the same checksum are acknowledged and left
        out; with another checksum, or out of order, the whole trace is refused.
        """
        try:
            trace.validate(self.spec.fingerprint)
            run, head = self._head(trace)
            if run != (trace.stream, trace.run):
                trace = dataclasses.replace(trace, stream=run[0], run=run[1])
            head = group.heads.get(run, head)
            known = max(0, min(head - trace.seq, len(trace)))
            rows = JournalRows.of(trace, group.end - known, self.entry.epoch)
            if known:
                self._require_same(rows.part(0, known), run, group)
                rows = rows.part(known)
        except RaymemError as error:
            return error
        except Exception as error:  # noqa: BLE001 - handed to the writer; those of the same group must not hear of it
            log.error("trace refused", bank=self.entry.name, error=repr(error))
            return RaymemError(f"a trace for bank {self.entry.name} could not be taken: {error!r}")
        gap = int(trace.seq > head and len(trace) > 0)
        if len(rows):
            group.parts.append(rows)
            group.heads[run] = trace.seq + len(trace)
            group.end += len(rows)
        return Ack(rows=len(rows), duplicates=known, end=group.end, gaps=gap, durable=True)

    def _require_same(self, rows: JournalRows, run: Run, group: _Group) -> None:
        """Raise SequenceConflict unless these rows are in the journal, or in the group, with the same content."""
        first = int(rows.seq_T[0])
        there = self.journal.find(*run, first, first + len(rows))
        for part in group.parts:
            if (part.streams[0], part.runs[0]) == run:
                there |= zip(part.seq_T.tolist(), part.crc_T.tolist(), strict=True)
        for seq, crc in zip(rows.seq_T.tolist(), rows.crc_T.tolist(), strict=True):
            if there.get(seq) == crc:
                continue
            problem = (
                "is already there with other content; use a new run for a new pass"
                if seq in there
                else "comes after later rows of that run; rows of a run must arrive in order: start a new run"
            )
            raise SequenceConflict(f"row {seq} of stream {run[0]!r} run {run[1]!r} {problem}", seq=seq)

    def _refuse(self, traces: Sequence[Trace], error: RaymemError) -> PendingCommit:
        """Acknowledge nothing, and look at the journal before the next write."""
        self.doubt()
        return PendingCommit([error] * len(traces))

    def _follow(self) -> None:
        """Apply what is in the journal, to which no other owner can add any more."""
        self.entry = self.journal.entry
        self.catch_up(self.journal.counted())
        self._enter(Standing.READY)

    def _replay_or_lose(self, rows: JournalRows) -> None:
        """Apply rows of the journal; a state that took some of them and failed is none any more."""
        if self.standing is Standing.LOST:
            # another caller's try failed while this one waited for it
            raise self._unsound("it failed before")
        try:
            self.replay(rows)
        except Exception as error:
            self._enter(Standing.LOST)
            raise self._unsound(repr(error)) from error

    def _unsound(self, why: str) -> RaymemError:
        return RaymemError(f"bank {self.entry.name} failed and will be reopened: {why}")

    def _enter(self, state: Standing) -> None:
        # readers and the writer may find something out at the same time, and nothing leads back from LOST
        with self._entering:
            if self.standing is not Standing.LOST:
                self.standing = state
