"""Which rows of which banks the workers keep, and which of them a request attends to.

It lives beside the scheduler, which is one, so that all ranks of an engine attend to the same rows.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raymem.errors import BankNotFound, TooLarge
from raymem.host.backend import detached
from raymem.memory.choice import Held, choose
from raymem.memory.showing import Asked, choose_shown
from raymem.serving.vllm.orders import Order, listed

_COLUMNS = ("chunks", "offsets", "tokens")
# BM25 has nothing to compare in fewer rows
_FEWEST = 2


@dataclass(frozen=True)
class Chosen:
    """Rows to attend to, in the order of their slots: row `offsets[i]` of chunk `chunks[i]`, of token `tokens[i]`.

    A chunk of -1 is a row of zeros. `relevance` is that of the best match among the banks.
    """

    chunks: list[int]
    offsets: list[int]
    tokens: list[int]
    relevance: float

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def key(self) -> str:
        """The same for the same rows alone: chunks get their numbers once."""
        return hashlib.sha256(f"{self.chunks} {self.offsets}".encode()).hexdigest()

    def without(self, chunks: Collection[int]) -> Chosen:
        """These rows, with others of them in the place of those that are gone; zeros where none is left."""
        kept = [row for row in zip(self.chunks, self.offsets, strict=True) if row[0] not in chunks] or [(-1, 0)]
        places = [
            row if row[0] not in chunks else kept[at % len(kept)]
            for at, row in enumerate(zip(self.chunks, self.offsets, strict=True))
        ]
        return Chosen([chunk for chunk, _ in places], [offset for _, offset in places], self.tokens, self.relevance)


@dataclass
class Chunk:
    """Rows that one pass computes: their positions in the bank's journal, and their tokens.

    `made`: they were made of all of the bank's, and `pos_N` is their order alone.
    """

    bank: str
    pos_N: Tensor
    tokens_N: Tensor
    whole: bool = False
    made: bool = False


@dataclass
class KeptBank:
    """One bank: where it is followed, whether it may be attended, and the chunks that the workers keep."""

    store: str
    id: str
    kind: str
    generation: int
    live: bool = True
    # the tokens that it is told by, where they are others than those of its rows
    about_T: Tensor | None = None
    chunks: list[int] = field(default_factory=list)
    held: Held | None = None
    chunk_T: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    offset_T: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class RowIndex:
    """Says what workers keep, within a budget; safe to be changed while a scheduler asks.

    Args:
        budget_bytes: of the rows in each worker.
        row_bytes: what one takes there.
        floor: the relevance from which on a bank is attended.
        ignored: tokens that say nothing about a question: the marks of a chat template.
    """

    def __init__(
        self, budget_bytes: int, row_bytes: int, *, floor: float = 0.0, ignored: Collection[int] = frozenset()
    ) -> None:
        self._floor = floor
        self._ignored = ignored
        self._budget = budget_bytes
        self._row_bytes = row_bytes
        self._banks: dict[str, KeptBank] = {}
        self._chunks: dict[int, Chunk] = {}
        self._next = 0
        self._dropped: list[int] = []
        self._lock = threading.Lock()

    def open(self, order: Order, tokens: Sequence[int]) -> int:
        """Make room for the rows of an order whose tokens these are; return their chunk.

        Raises:
            TooLarge: they don't fit the budget.
        """
        pos_N, tokens_N = torch.tensor(listed(order.pos)), torch.tensor(tokens)
        assert len(pos_N) == len(tokens_N), "a signed order whose rows and positions don't match"
        with self._lock:
            bank = self._banks.get(order.bank)
            made = order.do == "replace"
            anew = (
                bank is None
                or made
                or bank.about_T is not None
                or (bank.store, bank.id, bank.generation) != (order.store, order.id, order.generation)
            )
            before = [] if bank is None else bank.chunks
            again = [at for at in before if anew or bool(torch.isin(self._chunks[at].pos_N, pos_N).any())]
            self._require_room(order.bank, len(pos_N), again)
            self._drop(again)
            if bank is None or anew:
                self._release(order.bank)
                bank = self._banks[order.bank] = KeptBank(order.store, order.id, order.kind, order.generation)
                bank.about_T = torch.tensor(order.about) if made else None
            self._next += 1
            bank.chunks.append(self._next)
            self._chunks[self._next] = Chunk(order.bank, pos_N, tokens_N, made=made)
            return self._next

    def _require_room(self, name: str, rows: int, going: Collection[int]) -> None:
        kept = sum(len(chunk.pos_N) for at, chunk in self._chunks.items() if at not in going)
        if (kept + rows) * self._row_bytes > self._budget:
            raise TooLarge(
                f"{rows} rows of bank {name!r}, of {self._row_bytes} bytes each, don't fit beside the "
                f"{kept} that are kept: rows_bytes is {self._budget}; raise it in kv_connector_extra_config, or "
                "detach another bank's rows"
            )

    def complete(self, chunk: int) -> None:
        """Offer the rows of a chunk, all of which the workers have by the time that a later step asks for them."""
        with self._lock:
            if found := self._chunks.get(chunk):
                found.whole = True
                self._banks[found.bank].held = None

    def has(self, chunk: int) -> bool:
        """Whether a chunk was not forgotten."""
        with self._lock:
            return chunk in self._chunks

    def drop(self, chunks: Collection[int]) -> None:
        """Forget chunks."""
        with self._lock:
            self._drop(chunks)

    def release(self, name: str, bank_id: str | None = None) -> bool:
        """Forget a bank, of this id alone where one is given; say whether it was there."""
        with self._lock:
            there = self._banks.get(name) if bank_id is None else self._of_id(name, bank_id)
            return there is not None and self._release(name)

    def take_dropped(self) -> list[int]:
        """Chunks that were forgotten since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, []
            return dropped

    def followed(self) -> dict[str, KeptBank]:
        """The banks by name."""
        with self._lock:
            return dict(self._banks)

    def set_live(self, name: str, bank_id: str, live: bool) -> None:
        """Note whether a bank is attached to its store; nothing where the bank of this id is gone."""
        with self._lock:
            if bank := self._of_id(name, bank_id):
                bank.live = live

    def erased(self, name: str, bank_id: str, generation: int, positions_E: Tensor) -> None:
        """Forget the chunks with rows that were erased: what came after them in their pass has seen them.

        Nothing where the bank of this id is gone.
        """
        with self._lock:
            bank = self._of_id(name, bank_id)
            if bank is None:
                return
            bank.generation = generation
            kept = [(at, self._chunks[at]) for at in bank.chunks]
            self._drop([at for at, part in kept if part.made or bool(torch.isin(part.pos_N, positions_E).any())])

    def choose(self, names: Sequence[str], rows: int, question: Sequence[int]) -> Chosen:
        """Choose rows of banks, an equal share of each that has to do with the question; none where none has.

        Args:
            names: the banks, in the order of their slots.
            rows: the most of all banks together.
            question: token ids to which the rows should have something to say.

        Raises:
            BankNotFound, BankDetached: the engine keeps no rows of it, or its store has detached it.
        """
        question_Q = torch.tensor([token for token in question if token not in self._ignored], dtype=torch.int64)
        with self._lock, _one_thread():
            banks = [self._attendable(name) for name in names]
            if len(banks) == 1:
                found = [self._of_bank(banks[0], rows, question_Q)]
            else:
                matches = [_relevance(self._told_by(bank), question_Q) for bank in banks]
                asked = [bank for bank, match in zip(banks, matches, strict=True) if match >= self._floor]
                shares = [rows // len(asked) + (place < rows % len(asked)) for place in range(len(asked))]
                found = [self._of_bank(bank, share, question_Q) for bank, share in zip(asked, shares, strict=True)]
                found.append(Chosen([], [], [], max(matches)))
        chunks, offsets, tokens = ([each for part in found for each in getattr(part, name)] for name in _COLUMNS)
        return Chosen(chunks, offsets, tokens, max(part.relevance for part in found))

    def _of_id(self, name: str, bank_id: str) -> KeptBank | None:
        bank = self._banks.get(name)
        return bank if bank is not None and bank.id == bank_id else None

    def _attendable(self, name: str) -> KeptBank:
        bank = self._banks.get(name)
        if bank is None:
            raise BankNotFound(
                f"this engine keeps no rows of bank {name!r}; attach them with "
                "raymem.serving.vllm.attach_rows(llm, bank)"
            )
        if not bank.live:
            raise detached(name)
        return bank

    def _of_bank(self, bank: KeptBank, rows: int, question_Q: Tensor) -> Chosen:
        """The rows to attend to; none of a bank that has nothing to do with the question."""
        held, told_by = self._held(bank), self._told_by(bank)
        place_N = torch.arange(min(rows, len(held.pos_T)))
        relevance = None
        if len(place_N) < len(held.pos_T) and rows:
            choice = choose_shown(held, Asked(rows, None, question_Q, "bm25"), bank.kind)
            # the choice has compared the question with them already
            place_N, relevance = choice.place_N, choice.relevance if told_by is held and len(question_Q) else None
        relevance = _relevance(told_by, question_Q) if relevance is None else relevance
        if relevance < self._floor:
            place_N = place_N[:0]
        chunks, offsets, tokens = (column[place_N].tolist() for column in (bank.chunk_T, bank.offset_T, held.tokens_T))
        return Chosen(chunks, offsets, tokens, relevance)

    def _told_by(self, bank: KeptBank) -> Held:
        if bank.about_T is None:
            return self._held(bank)
        order_T = torch.arange(len(bank.about_T))
        return Held(None, bank.about_T, torch.zeros_like(order_T), order_T)

    def _held(self, bank: KeptBank) -> Held:
        if bank.held is not None:
            return bank.held
        parts = [(at, self._chunks[at]) for at in bank.chunks if self._chunks[at].whole]
        empty = [torch.zeros(0, dtype=torch.int64)]
        pos_T = torch.cat(empty + [chunk.pos_N for _, chunk in parts])
        order_T = torch.argsort(pos_T)
        sizes_C = torch.tensor([len(chunk.pos_N) for _, chunk in parts], dtype=torch.int64)
        numbers_C = torch.tensor([at for at, _ in parts], dtype=torch.int64)
        chunk_T = torch.repeat_interleave(numbers_C, sizes_C)[order_T]
        bank.chunk_T = chunk_T
        bank.offset_T = torch.cat(empty + [torch.arange(size) for size in sizes_C.tolist()])[order_T]
        tokens_T = torch.cat(empty + [chunk.tokens_N for _, chunk in parts])[order_T]
        bank.held = Held(states_TD=None, tokens_T=tokens_T, run_T=chunk_T, pos_T=pos_T[order_T])
        return bank.held

    def _release(self, name: str) -> bool:
        bank = self._banks.pop(name, None)
        if bank is not None:
            self._drop_chunks(bank.chunks)
        return bank is not None

    def _drop(self, chunks: Collection[int]) -> None:
        for at in chunks:
            if (chunk := self._chunks.get(at)) and (bank := self._banks.get(chunk.bank)):
                bank.chunks.remove(at)
                bank.held = None
        self._drop_chunks(chunks)

    def _drop_chunks(self, chunks: Collection[int]) -> None:
        self._dropped += [at for at in chunks if self._chunks.pop(at, None)]


def _relevance(held: Held, question_Q: Tensor) -> float:
    """How much of a question a bank has words for, in [0, 1]: 1 where there is no question."""
    if not len(question_Q):
        return 1.0
    if len(held.pos_T) < _FEWEST:
        return 0.0
    # of all rows but one: choosing all compares nothing
    return choose(held, None, question_Q, len(held.pos_T) - 1, method="bm25").relevance


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without torch's threads: beside a worker's they wait for each other, longer than the work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
