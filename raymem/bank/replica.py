"""One bank at work: journal, encoder and mechanism, kept in step.

A runtime is used by one owner at a time. Writes are journaled first and applied after: large groups at once, small ones
together, at the latest when somebody looks. A read waits for an application, never for a commit.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from raymem.bank.apply_queue import SMALL_BYTES, ApplyQueue
from raymem.bank.dedup import Dedup, Runs
from raymem.bank.prefetch import prefetch
from raymem.encode.encoder import Encoder, assemble
from raymem.errors import Corrupt, RaymemError, StoreClosed, TooLarge
from raymem.logs import get_logger
from raymem.memory.base import EncodedRows, Found, State
from raymem.memory.learned import Learned
from raymem.rows import JournalRows
from raymem.storage.catalog import part_of
from raymem.storage.history import materialise
from raymem.storage.journal.log import Log
from raymem.storage.store import ColdStore, Entry
from raymem.types import Ack, BankSpec, Readout, Trace, check_hidden

# what encoding makes of so many bytes, some five times as much, stays in the processor's cache: thrice as fast
_PIECE_BYTES = 2**20
# so many queries at once: between them a read can be given up
_BLOCK_QUERIES = 64
# what a read may make: a neighbour costs so many bytes on its way, and each number of its vector
_MOST_QUERIES, _ANSWER_BYTES = 2**16, 2**30
_NEIGHBOUR_BYTES, _NUMBER_BYTES = 256, 10
Wanted = Callable[[], bool]
Progress = Callable[[int, int], None]
log = get_logger("raymem.bank.replica")


@dataclass
class Counters:
    """What has happened to a bank since it was opened, in rows unless named otherwise."""

    rows_written: int = 0
    duplicates: int = 0
    gaps: int = 0
    commits: int = 0
    reads: int = 0
    queries: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Staged:
    """A group of traces on its way: each one's Ack or refusal, its new rows, and whether they go into the log."""

    outcomes: list[Ack | RaymemError]
    rows: JournalRows | None = None
    logged: bool = False


def learned_of(cold: ColdStore, spec: BankSpec) -> Learned | None:
    """The weights that a spec names, if it does.

    Raises:
        NotFound, Corrupt: they are not in the store, or not what their name says.
    """
    return Learned.from_bytes(cold.params.get(spec.params), spec.params) if spec.params else None


class Replica:
    """A bank's encoder and mechanism in this process, brought up to date from its journal, read-only.

    This is what an owner's runtime builds on and what a follower in a vLLM worker tails.
    """

    def __init__(self, cold: ColdStore, entry: Entry, device: str = "cpu") -> None:
        self.cold = cold
        self.entry = entry
        self.spec: BankSpec = entry.spec
        self.device = torch.device(device)
        self.calibration = cold.calibrations.load(self.spec.fingerprint.calibration)
        self.learned = learned_of(cold, self.spec)
        self.encoder, self.memory = assemble(self.spec, self.calibration, self.learned)
        self.memory.to(self.device).requires_grad_(False)
        self.journal = cold.journal(entry)
        self.lock = threading.Lock()
        self.pos = 0
        self.snapshot_pos = 0
        with self._here():
            self.state = self.memory.empty()

    def recover(self, progress: Progress | None = None, upto: int | None = None) -> None:
        """Load the newest sound snapshot, then replay the journal's tail, both up to position `upto`."""
        self.load(upto)
        self.catch_up(progress, upto)

    def load(self, upto: int | None = None) -> None:
        """Load the newest sound snapshot up to position `upto`, if there is one.

        One whose tensors no bank of this spec can have is passed over: the journal makes the state anew.
        """
        while (found := self.cold.state(self.entry, upto)) is not None:
            try:
                return self._restore(*found)
            except Corrupt as error:
                log.warning("snapshot passed over", bank=self.entry.name, pos=found[0], reason=error.message)
                upto = found[0] - 1

    def catch_up(self, progress: Progress | None = None, upto: int | None = None) -> int:
        """Apply the rows journaled since the last call; return how many. The scan runs ahead of the encoder.

        Args:
            progress: called with rows applied and rows in all.
            upto: the position to stop at; the journal's end by default.
        """
        before, end = self.pos, self.journal.end() if upto is None else upto
        if end > before:
            for rows in prefetch(self.journal.scan(before, upto)):
                self.apply(rows)
                if progress is not None:
                    progress(self.pos - before, end - before)
            # the last rows may have been erased, and their positions are not given again
            self.pos = max(self.pos, end)
        return self.pos - before

    def apply(self, rows: JournalRows) -> None:
        """Encode journaled rows and let the mechanism absorb them, a cacheful at a time."""
        for piece in rows.pieces(_PIECE_BYTES):
            self._apply(piece)

    def _apply(self, rows: JournalRows) -> None:
        encoded = self.encoder.push(rows)
        with self.lock, torch.no_grad(), self._here():
            if len(encoded):
                self.state = self.memory.absorb(self.state, _to(encoded, self.device))
            self.pos = int(rows.pos_T[-1]) + 1

    def read(self, hidden_QLD: Tensor, k: int = 32, start: int = 1, wanted: Wanted = lambda: True) -> Readout:
        """Answer Q consecutive states of one context, the first of which stood at position `start`.

        A long read asks now and then whether it is still `wanted`.

        Raises:
            StoreClosed: it is not.
            InvalidTrace, NonFinite: the states don't fit the bank's fingerprint.
            TooLarge: the answer would not fit in memory, naming how many queries may be asked.
        """
        check_hidden(hidden_QLD, self.spec.fingerprint)
        _check_answer(len(hidden_QLD), k, self.memory.dims.value)
        with torch.no_grad(), self._here():
            queries_QK = self.encoder.keys(hidden_QLD, start).to(self.device)
            with self.lock:
                # an erasure puts others in the place of both
                encoder, found = self.encoder, self._lookup(queries_QK, k, wanted)
        return self._readout(found, encoder)

    def _lookup(self, queries_QK: Tensor, k: int, wanted: Wanted) -> Found:
        # a state of bounded size takes no time; rows do, and each query is answered by itself
        size = _BLOCK_QUERIES if self.memory.keeps_rows else max(1, len(queries_QK))
        parts = []
        for block_QK in torch.split(queries_QK, size):
            if not wanted():
                raise StoreClosed("this store is being closed; connect again, and read again")
            parts.append(self.memory.lookup(self.state, block_QK, k))
        return parts[0] if len(parts) == 1 else _together(parts)

    def _readout(self, found: Found, encoder: Encoder) -> Readout:
        def cpu(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.cpu()

        source_Qk, sources = _named(cpu(found.source_Qk), encoder.sources)
        return Readout(
            values_QV=found.values_QV.cpu(),
            relevance_Q=encoder.relevance(found.similarity_Q.cpu()),
            tokens_Qk=cpu(found.tokens_Qk),
            scores_Qk=cpu(found.scores_Qk),
            pos_Qk=cpu(found.pos_Qk),
            seq_Qk=cpu(found.seq_Qk),
            source_Qk=source_Qk,
            sources=sources,
            kind=self.spec.kind,
            # a partition's rows are blended with those of the others
            vectors_QkV=cpu(found.vectors_QkV) if part_of(self.entry.name) else None,
        )

    def tensors(self) -> State:
        """The whole state as named tensors on the CPU: the encoder's and the mechanism's."""
        encoder, _ = self.encoder.dump()
        with self.lock, torch.no_grad():
            memory = self.memory.dump(self.state)
        named = {f"memory.{name}": tensor for name, tensor in memory.items()}
        named |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}

    def digest(self) -> str:
        """sha256 over the names, dtypes, shapes and bytes of the whole state."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def save(self) -> None:
        """Write the whole state to the cold store."""
        _, meta = self.encoder.dump()
        self.cold.snapshots(self.entry).save(self.pos, self.tensors(), {"encoder": meta})
        self.snapshot_pos = self.pos

    @property
    def nbytes(self) -> int:
        """Bytes the mechanism's state holds."""
        return self.memory.nbytes(self.state)

    def _here(self) -> AbstractContextManager[object]:
        # naming the device where it is the default anyway would be a third of a small write's work
        return nullcontext() if self.device.type == "cpu" else self.device

    def _restore(self, pos: int, tensors: State, meta: dict[str, object]) -> None:
        def part(prefix: str) -> State:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        try:
            encoder_meta = meta["encoder"]
            assert isinstance(encoder_meta, dict)
            with self._here():
                state = self.memory.load({n: t.to(self.device) for n, t in part("memory.").items()})
            # the last that can fail: a snapshot is taken whole or not at all
            self.encoder.load(part("encoder."), encoder_meta)
        except (KeyError, AssertionError) as error:
            raise Corrupt(f"snapshot of {self.entry.name} at {pos} lacks a part: {error}") from error
        self.state = state
        self.pos = self.snapshot_pos = pos


class Runtime(Replica):
    """A bank and its owner: a replica that also writes the journal."""

    def __init__(self, cold: ColdStore, entry: Entry, device: str = "cpu", log: Log | None = None) -> None:
        super().__init__(cold, entry, device)
        self.counters = Counters()
        self.unsaved_bytes = 0
        self._unsaved_since: float | None = None
        self.log = log
        # whether the journal may be other than this runtime knows: the next write looks
        self.unsure = False
        # whether the state may be another than the journal's: only a fresh runtime is sound
        self.broken = False
        self._apply_queue = ApplyQueue()

    @classmethod
    def open(
        cls,
        cold: ColdStore,
        entry: Entry,
        *,
        device: str = "cpu",
        log: Log | None = None,
        progress: Progress | None = None,
    ) -> Runtime:
        """A recovered runtime of a bank that this process owns."""
        runtime = cls(cold, entry, device, log)
        with ThreadPoolExecutor(1, thread_name_prefix="raymem-fence") as beside:
            # a fence waits for the disk most of the time
            fenced = beside.submit(runtime.journal.claim, entry, log)
            runtime.load()
            fenced.result()
        runtime._follow(progress)
        return runtime

    def own(self, entry: Entry) -> None:
        """Take the journal over under a newly claimed entry: fence off earlier owners, then apply what they added."""
        self.unsure = True
        self.absorb()
        if entry.generation != self.journal.entry.generation:
            self.journal = self.cold.journal(entry)
        self.journal.claim(entry, self.log)
        self._follow()

    def become(self, replica: Replica, entry: Entry) -> None:
        """Go on with the state that `replica` made, under an entry whose journal was rewritten."""
        self._apply_queue.clear()
        with self.lock:
            self.encoder, self.state = replica.encoder, replica.state
            self.pos, self.snapshot_pos = replica.pos, replica.snapshot_pos
        self.unsaved_bytes = 0
        self.own(entry)

    def write(self, traces: Sequence[Trace]) -> list[Ack | RaymemError]:
        """Journal the new rows of all traces in one commit, then apply them: `stage`, `commit`, `finish` and `absorb`.

        Returns:
            For each trace its Ack, or the error that refused it; a refused trace changes nothing and does not keep
            the others back. When the commit fails, no trace is acknowledged.
        """
        staged = self.stage(traces)
        if staged.rows is not None:
            try:
                self.commit(staged.rows, logged=staged.logged)
            except RaymemError as error:
                staged = self.fail(traces, error)
        outcomes = self.finish(staged)
        self.absorb()
        return outcomes

    def at_hand(self, traces: Sequence[Trace]) -> bool:
        """Whether `stage` needs no look into the store for these traces, and so takes no time worth a thread."""
        if self.unsure or not self.journal.ready:
            return False
        heads: dict[tuple[str, str], int] = {}
        for trace in traces:
            run = self.encoder.spelling(trace.stream, trace.run)
            if trace.seq < (heads.get(run) or self._next_seq(*run)):
                return False
            heads[run] = trace.seq + len(trace)
        return True

    def stage(self, traces: Sequence[Trace]) -> Staged:
        """Check a group of traces and decide which of their rows are new; nothing is changed yet."""
        try:
            if self.unsure:
                self.own(self.entry)
            staging = Dedup(self.entry, Runs(self._next_seq, self.journal.find, self.encoder.spelling), self.end)
            outcomes = [staging.add(trace) for trace in traces]
            rows = staging.rows()
            return Staged(outcomes, rows, rows is not None and self.journal.accept(rows))
        except RaymemError as error:
            return self.fail(traces, error)

    def commit(self, rows: JournalRows, *, logged: bool) -> None:
        """Make staged rows durable. A host with many banks commits logged rows of all of them together instead."""
        if logged and self.log is not None:
            self.log.commit([(self.entry, rows)])
        else:
            self.journal.append(rows)

    def finish(self, staged: Staged) -> list[Ack | RaymemError]:
        """Apply what was committed, or keep it for `absorb` where it is small; return the outcomes."""
        rows = staged.rows
        if rows is not None:
            if rows.nbytes <= SMALL_BYTES:
                self._apply_queue.add(rows)
            else:
                self.absorb()
                self._attempt(rows)
            self.counters.commits += 1
            self.unsaved_bytes += rows.nbytes
            self._unsaved_since = self._unsaved_since or time.monotonic()
        self._count(staged.outcomes)
        return staged.outcomes

    def absorb(self) -> None:
        """Apply what is committed and has waited.

        Raises:
            RaymemError: the state is no longer the journal's; nothing that was acknowledged is lost.
        """
        if self.broken:
            raise self._unsound("it failed before")
        self._apply_queue.apply(self._attempt)

    @property
    def behind(self) -> bool:
        """Whether it is time to `absorb` although nobody has looked."""
        return self._apply_queue.due

    @property
    def nbytes(self) -> int:
        """Bytes of the mechanism's state, and of the rows that wait for it."""
        return super().nbytes + self._apply_queue.nbytes

    @property
    def end(self) -> int:
        """The position after the last row committed, as this owner knows it."""
        return self._apply_queue.end or self.pos

    def fail(self, traces: Sequence[Trace], error: RaymemError) -> Staged:
        """Acknowledge nothing. Some of a failed commit may be in the journal all the same: look before the next one."""
        self.unsure = True
        return Staged([error] * len(traces))

    def let_go(self) -> None:
        """Before a hand-over or a rewriting: settle every row. The next write takes the journal back, if it may."""
        self.unsure = True
        self.journal.let_go()

    def read(self, hidden_QLD: Tensor, k: int = 32, start: int = 1, wanted: Wanted = lambda: True) -> Readout:
        """As `Replica.read`, of all that is committed; counted."""
        self.absorb()
        readout = super().read(hidden_QLD, k, start, wanted)
        self.counters.reads += 1
        self.counters.queries += len(hidden_QLD)
        return readout

    def digest(self) -> str:
        """As `Replica.digest`, of all that is committed."""
        self.absorb()
        return super().digest()

    def rest(self) -> int:
        """Settle every row and snapshot: what a bank does before it is cold; return the position it stands at.

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
        self.absorb()
        if self.pos > self.snapshot_pos:
            self.save()
        self.unsaved_bytes = 0
        self._unsaved_since = None
        return self.pos

    @property
    def unsaved_s(self) -> float:
        """Seconds since the oldest row came that no snapshot has, or 0."""
        return 0.0 if self._unsaved_since is None else time.monotonic() - self._unsaved_since

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

    def _follow(self, progress: Progress | None = None) -> None:
        """Apply what is in the journal, now that nobody else can add to it."""
        self.entry = self.journal.entry
        self.catch_up(progress, self.journal.counted())
        self.unsure = False

    def _next_seq(self, stream: str, run: str) -> int:
        return self._apply_queue.head(stream, run) or self.encoder.next_seq(stream, run)

    def _attempt(self, rows: JournalRows) -> None:
        """Apply rows of the journal; a state that took some of them and failed is none any more."""
        if self.broken:
            # somebody else's try failed while this one waited for it
            raise self._unsound("it failed before")
        try:
            self.apply(rows)
        except Exception as error:
            self.broken = True
            raise self._unsound(repr(error)) from error

    def _unsound(self, why: str) -> RaymemError:
        return RaymemError(f"bank {self.entry.name} failed and will be reopened: {why}")

    def _count(self, outcomes: Sequence[Ack | RaymemError]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Ack):
                self.counters.rows_written += outcome.rows
                self.counters.duplicates += outcome.duplicates
                self.counters.gaps += outcome.gaps
            else:
                self.counters.refused += 1


def _together(parts: list[Found]) -> Found:
    return Found(**{column.name: _joined([getattr(part, column.name) for part in parts]) for column in fields(Found)})


def _joined(parts: list[Tensor | None]) -> Any:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _check_answer(queries: int, k: int, width: int) -> None:
    each = k * (_NEIGHBOUR_BYTES + _NUMBER_BYTES * width)
    most = min(_MOST_QUERIES, _ANSWER_BYTES // max(1, each))
    if queries > most:
        raise TooLarge(
            f"{queries} queries with {k} neighbours each; ask {most} at once at most, or for fewer neighbours"
        )


def _named(
    source_Qk: Tensor | None, known: Sequence[tuple[str, str]]
) -> tuple[Tensor | None, tuple[tuple[str, str], ...]]:
    """Provenance over only those runs that a readout names; a bank may have seen a million."""
    if source_Qk is None:
        return None, ()
    used, index_Qk = torch.unique(source_Qk, return_inverse=True)
    first = int((used < 0).sum())
    return index_Qk - first, tuple(known[source] for source in used[first:].tolist())


def _to(rows: EncodedRows, device: torch.device) -> EncodedRows:
    if device.type == "cpu":
        return rows
    values = None if rows.values_NV is None else rows.values_NV.to(device)
    moved = (rows.pos_N.to(device), rows.seq_N.to(device), rows.source_N.to(device))
    return EncodedRows(rows.keys_NK.to(device), rows.tokens_N.to(device), values, *moved)
