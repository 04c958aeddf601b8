"""A bank's encoder and mechanism in one process, kept in step with its journal."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from raymem.bank.held import HeldRows, HeldStates, chosen_layer, fetched
from raymem.encode.encoder import assemble
from raymem.encode.keys import ContextRows
from raymem.errors import Corrupt, StoreClosed, TooLarge
from raymem.inputs import check_hidden
from raymem.logs import get_logger
from raymem.memory.base import EncodedRows, Found, State, shows_rows, unshown
from raymem.memory.learned import Learned
from raymem.rows import JournalRows
from raymem.storage.catalog import part_of
from raymem.storage.store import ColdStore, Entry
from raymem.tensors import to_bytes
from raymem.types import AttendQuery, BankSpec, MemoryTokens, Readout

# what encoding makes of so many bytes, some five times as much, stays in the processor's cache: thrice as fast
_PIECE_BYTES = 2**20
# so many queries at once: between them a read can be given up
_BLOCK_QUERIES = 64
# what a read may make: a neighbour costs so many bytes on its way, and each number of its vector
_MOST_QUERIES, _ANSWER_BYTES = 2**16, 2**30
_NEIGHBOUR_BYTES, _NUMBER_BYTES = 256, 10
_AHEAD = 2
T = TypeVar("T")
Wanted = Callable[[], bool]
log = get_logger("raymem.bank.replica")


def learned_of(cold: ColdStore, spec: BankSpec) -> Learned | None:
    """The weights that a spec names, if it does.

    Raises:
        NotFound, Corrupt: they are not in the store, or not what their name says.
    """
    return Learned.from_bytes(cold.params.get(spec.params), spec.params) if spec.params else None


class Replica:
    """A bank's encoder and mechanism in this process, brought up to date from its journal, read-only.

    A bank's owner builds on this; a follower in a vLLM worker tails it.
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
        # states that choosing rows compares, by layer, once asked for, and their bytes
        self.held_bytes = 0
        self._held: dict[int, HeldStates] = {}
        self._holding = threading.Lock()
        self.pos = 0
        self.snapshot_pos = 0
        # a partition's rows are blended with those of the others
        self._keeps_vectors = part_of(entry.name) is not None
        # naming the device where it is the default anyway would be a third of a small write's work
        self._here: AbstractContextManager[object] = nullcontext() if self.device.type == "cpu" else self.device
        with self._here:
            self.state = self.memory.empty()

    def recover(self, upto: int | None = None) -> None:
        """Load the newest sound snapshot, then replay the journal's tail, both up to position `upto`."""
        self.load(upto)
        self.catch_up(upto)

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

    def catch_up(self, upto: int | None = None) -> int:
        """Apply the rows journaled since the last call, up to position `upto` or the journal's end; return how many.

        The scan runs ahead of the encoder.
        """
        before, end = self.pos, self.journal.end() if upto is None else upto
        if end > before:
            for rows in prefetch(self.journal.scan(before, upto)):
                self.replay(rows)
            # the last rows may have been erased, and their positions are not given again
            self.pos = max(self.pos, end)
        return self.pos - before

    def replay(self, rows: JournalRows) -> None:
        """Encode journaled rows and apply them to the state, a cacheful at a time."""
        for piece in rows.pieces(_PIECE_BYTES):
            encoded = self.encoder.push(piece)
            with self.lock, torch.no_grad(), self._here:
                if len(encoded):
                    self.state = self.memory.absorb(self.state, _to(encoded, self.device))
                self.pos = int(piece.pos_T[-1]) + 1

    def read(self, hidden_QLD: Tensor, k: int = 32, start: int = 1, wanted: Wanted = lambda: True) -> Readout:
        """Answer Q consecutive states of one context, the first of which stood at position `start`.

        A long read asks now and then whether it is still `wanted`.

        Raises:
            StoreClosed: it is not.
            InvalidTrace, NonFinite: the states don't fit the bank's fingerprint.
            TooLarge: the answer would not fit in memory, naming how many queries may be asked.
        """
        return self.read_contexts([ContextRows(hidden_QLD, start)], k, wanted)

    def read_contexts(self, contexts: Sequence[ContextRows], k: int = 32, wanted: Wanted = lambda: True) -> Readout:
        """Answer rows of several contexts in one search, one context after the other; see `read`."""
        for context in contexts:
            check_hidden(context.hidden_QLD, self.spec.fingerprint)
        each = k * (_NEIGHBOUR_BYTES + _NUMBER_BYTES * self.memory.dims.value)
        most = min(_MOST_QUERIES, _ANSWER_BYTES // max(1, each))
        if (queries := sum(context.queries for context in contexts)) > most:
            raise TooLarge(
                f"{queries} queries with {k} neighbours each; ask {most} at once at most, or for fewer neighbours"
            )
        parts: list[Found] = []
        with torch.no_grad(), self._here:
            queries_QK = self.encoder.keys(contexts).to(self.device)
            # a state of bounded size takes no time; rows do, and each query is answered by itself
            size = _BLOCK_QUERIES if self.memory.keeps_rows else max(1, len(queries_QK))
            with self.lock:
                # an erasure replaces both
                encoder, state = self.encoder, self.state
                for block_QK in torch.split(queries_QK, size):
                    if not wanted():
                        raise StoreClosed("this store is being closed; connect again, and read again")
                    parts.append(self.memory.lookup(state, block_QK, k))
        found = parts[0] if len(parts) == 1 else _together(parts)
        source_Qk, sources = None, ()
        if found.source_Qk is not None:
            # provenance over only those runs that the readout names: a bank may have seen a million
            used, index_Qk = torch.unique(found.source_Qk.cpu(), return_inverse=True)
            first = int((used < 0).sum())
            known = encoder.sources
            source_Qk, sources = index_Qk - first, tuple(known[source] for source in used[first:].tolist())
        return Readout(
            values_QV=found.values_QV.cpu(),
            relevance_Q=encoder.relevance(found.similarity_Q.cpu()),
            tokens_Qk=_cpu(found.tokens_Qk),
            scores_Qk=_cpu(found.scores_Qk),
            pos_Qk=_cpu(found.pos_Qk),
            seq_Qk=_cpu(found.seq_Qk),
            source_Qk=source_Qk,
            sources=sources,
            kind=self.spec.kind,
            vectors_QkV=_cpu(found.vectors_QkV) if self._keeps_vectors else None,
        )

    def attend(self, query: AttendQuery, wanted: Wanted = lambda: True) -> MemoryTokens:
        """Choose the rows that a model is to attend to, of those that the mechanism still has.

        The first call reads one layer's states from the journal and keeps them; later ones read what has come since.

        Raises:
            StoreClosed: it is no longer `wanted`.
            InvalidInput: another layer, or nothing to choose by. InvalidTrace, NonFinite: the states don't fit.
            TooLarge: too many states or tokens, or keys and values that don't fit into one answer.
            Unsupported: the bank's kind keeps no rows.
        """
        layer = self._attendable(query)
        if query.hidden_QLD is not None:
            check_hidden(query.hidden_QLD, self.spec.fingerprint)
        rows, query_QD = self._choosable(query, layer, wanted)
        chosen, _ = rows.choose(query, query_QD, self.spec.kind)
        if not self._keeps_vectors:
            chosen = replace(chosen, states_ND=None)
        return fetched(self.cold, [self.entry], chosen) if query.fetch else chosen

    def attend_bytes(self, query: AttendQuery) -> int:
        """About how many bytes the states that a query is compared with will take more than now."""
        states = self._held.get(self._attendable(query))
        return max(
            0, HeldStates.row_bytes(self.spec.fingerprint.width) * self.pos - (0 if states is None else states.nbytes)
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
            total.update(to_bytes(tensor).data)
        return total.hexdigest()

    def save(self) -> None:
        """Write the whole state to the cold store."""
        _, meta = self.encoder.dump()
        self.cold.snapshots(self.entry).save(self.pos, self.tensors(), {"encoder": meta})
        self.snapshot_pos = self.pos

    @property
    def nbytes(self) -> int:
        """Bytes of the mechanism's state, and of the states that choosing rows compares."""
        return self.memory.nbytes(self.state) + self.held_bytes

    def _attendable(self, query: AttendQuery) -> int:
        """The layer whose states are compared, once the query is one that this bank can answer."""
        if not shows_rows(self.spec.kind):
            raise unshown(self.spec.kind)
        query.require_bounded()
        return chosen_layer(query, self.spec.fingerprint)

    def _choosable(self, query: AttendQuery, layer: int, wanted: Wanted) -> tuple[HeldRows, Tensor | None]:
        """The rows that attention may see, and a query's states as they are compared with theirs."""
        span = self.spec.key.window if self.spec.key.function == "span" else 1
        with self._holding, torch.no_grad():
            states = self._held.get(layer)
            if states is None:
                states = self._held[layer] = HeldStates(self.calibration, layer)
            try:
                states.follow(self.journal, self.pos, wanted)
                with self.lock, self._here:
                    # what came meanwhile is little, and the state must know no row that is not here
                    states.follow(self.journal, self.pos, wanted)
                    rows = states.rows(self.pos)
                    given_N = rows.encoded(span)
                    shown = self.memory.shown(self.state, given_N.to(self.device))
            finally:
                self.held_bytes = sum(each.nbytes for each in self._held.values())
        query_QD = None if query.hidden_QLD is None else states.unit(query.hidden_QLD)
        return rows.left(given_N, shown, span), query_QD

    def _restore(self, pos: int, tensors: State, meta: dict[str, object]) -> None:
        parts: dict[str, State] = {"memory": {}, "encoder": {}}
        for name, tensor in tensors.items():
            prefix, _, rest = name.partition(".")
            parts.setdefault(prefix, {})[rest] = tensor
        try:
            encoder_meta = meta["encoder"]
            assert isinstance(encoder_meta, dict)
            with self._here:
                state = self.memory.load({name: tensor.to(self.device) for name, tensor in parts["memory"].items()})
            # the last that can fail: a snapshot is taken whole or not at all
            self.encoder.load(parts["encoder"], encoder_meta)
        except (KeyError, AssertionError) as error:
            raise Corrupt(f"snapshot of {self.entry.name} at {pos} lacks a part: {error}") from error
        self.state = state
        self.pos = self.snapshot_pos = pos


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield `items` in order while a thread makes up to two ahead; errors arrive where the item would have."""
    source = iter(items)
    done = object()
    with ThreadPoolExecutor(1, thread_name_prefix="raymem-prefetch") as pool:
        ahead: deque[Future[object]] = deque(pool.submit(next, source, done) for _ in range(_AHEAD))
        while (item := ahead.popleft().result()) is not done:
            ahead.append(pool.submit(next, source, done))
            yield item  # type: ignore[misc]


def _together(parts: list[Found]) -> Found:
    return Found(**{column.name: _joined([getattr(part, column.name) for part in parts]) for column in fields(Found)})


def _joined(parts: list[Tensor | None]) -> Any:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _to(rows: EncodedRows, device: torch.device) -> EncodedRows:
    if device.type == "cpu":
        return rows
    values = None if rows.values_NV is None else rows.values_NV.to(device)
    moved = (rows.pos_N.to(device), rows.seq_N.to(device), rows.source_N.to(device))
    return EncodedRows(rows.keys_NK.to(device), rows.tokens_N.to(device), values, *moved)
