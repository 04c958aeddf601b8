"""Attended rows in a worker: keys and values that the engine computed once, and that requests attend to later.

The scheduler's side decides what is captured, kept and shown, so that all ranks of an engine do the same; here lie the
bytes. Rows are kept in chunks, one a pass that computed them, on the host.

Shape legend: L attention layers, N rows, H key and value heads of this rank, d head width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from raymem.errors import FingerprintMismatch, TooLarge
from raymem.lm.attending import Rope
from raymem.logs import get_logger
from raymem.serving.vllm.orders import listed

log = get_logger("raymem.vllm")
# torch shares larger operations among threads, which wait for each other, milliseconds each on a busy machine
_SERIAL = 2**15


@dataclass(frozen=True)
class Capture:
    """Rows of a chunk that this step computes: row `first + i` is the pass's token `positions[i]`, in `slots[i]`.

    `bank` is the bank's id; `pos` are the positions of the whole chunk in its journal, as ranges, end exclusive.
    """

    bank: str
    pos: list[tuple[int, int]]
    chunk: int
    rows: int
    first: int
    positions: list[int]
    slots: list[int]


@dataclass(frozen=True)
class Load:
    """A chunk whose rows this worker holds under a name: read from their bank's store, or made of the bank.

    `bank` is the bank's id. Rows that were made are at no position of its journal: `pos` is empty.
    """

    bank: str
    pos: list[tuple[int, int]]
    chunk: int
    staged: str


@dataclass(frozen=True)
class Fill:
    """Rows for the paged cache: row `offsets[i]` of chunk `chunks[i]` goes to slot `slots[i]`, position `first + i`.

    A chunk of -1 is a row of zeros: what was chosen is gone.
    """

    request: str
    first: int
    slots: list[int]
    chunks: list[int]
    offsets: list[int]


@dataclass
class RowCounters:
    """What a worker keeps, in rows and bytes, and what it did since the engine started."""

    rows: int = 0
    bytes: int = 0
    staged_bytes: int = 0
    chunks_lost: int = 0
    rows_captured: int = 0
    rows_loaded: int = 0
    rows_filled: int = 0
    fills: int = 0


class PagedCache(Protocol):
    """What fills and reads the engine's paged cache."""

    def write(self, keys_LNHd: Tensor, values_LNHd: Tensor, slots_N: Tensor) -> None:
        """Write turned keys, and values, of all layers into slots."""

    def own_share(self, rows_LNHd: Tensor) -> Tensor:
        """Of a whole model's keys or values those of this worker's layers and heads."""

    def require_whole(self) -> None:
        """Raise Unsupported where other workers have some of the layers or heads."""

    def zeros(self, rows: int) -> Tensor:
        """Keys or values of no token."""

    def watch(self, slots_N: Tensor) -> None:
        """Keep what the next pass writes into these slots."""

    def seen(self) -> tuple[Tensor, Tensor] | None:
        """Turned keys and values `[L, N, H, d]` of the watched slots, on the host; watching ends.

        None where the pass did not show them: one that a CUDA graph replays calls no backend.
        """


class RowStore:
    """The chunks of one worker.

    Args:
        cache: the engine's paged cache.
        rope: turns keys back to position 0, and to the slots in which they are attended.
        staged_bytes: of the rows that wait for their orders, beside those in chunks, at most.
    """

    def __init__(self, cache: PagedCache, rope: Rope, staged_bytes: int) -> None:
        self._cache = cache
        self._most_staged = staged_bytes
        self.rope = rope
        self._chunks: dict[int, tuple[Tensor, Tensor]] = {}
        self._sources: dict[int, tuple[str, list[tuple[int, int]]]] = {}
        # by the name that an order says, which is of one bank alone
        self._staged: dict[str, tuple[Tensor, Tensor]] = {}
        self._staged_of: dict[str, str] = {}
        # under which name a chunk's rows were staged
        self._loaded: dict[int, str] = {}
        self._lost: list[int] = []
        self._watched: list[Capture] = []
        self._count = RowCounters()

    def stage(self, bank: str, name: str, keys_LNHd: Tensor, values_LNHd: Tensor) -> None:
        """Hold rows of a bank, of the whole model, until an order says which chunk they are.

        Raises:
            FingerprintMismatch: another model's. TooLarge: they don't fit beside those that wait already.
        """
        wanted = self._cache.zeros(keys_LNHd.shape[1])
        own = [self._cache.own_share(rows).to(wanted.dtype) for rows in (keys_LNHd, values_LNHd)]
        if own[0].shape != wanted.shape:
            raise FingerprintMismatch(
                f"the store's keys are {list(keys_LNHd.shape)}, and this worker has {list(wanted.shape)}: they are "
                "another model's; forget them with detach_rows, or use another bank",
                fields=["rows"],
            )
        size, before = sum(rows.nbytes for rows in own), self._staged.get(name, ())
        held = self._count.staged_bytes - sum(rows.nbytes for rows in before)
        if held + size > self._most_staged:
            raise TooLarge(
                f"{size} bytes of rows of bank {bank!r} don't fit beside the {held} that wait to be attended: "
                f"rows_bytes is {self._most_staged}; raise it in kv_connector_extra_config, or detach another bank"
            )
        self._staged[name], self._staged_of[name] = (own[0], own[1]), bank
        self._count.staged_bytes = held + size

    def unstage(self, bank: str) -> None:
        """Forget the rows of a bank that wait for their orders."""
        for name in [name for name, of in self._staged_of.items() if of == bank]:
            self._take(name)

    def begin(
        self,
        captures: Sequence[Capture],
        fills: Sequence[Fill],
        dropped: Sequence[int],
        loads: Sequence[Load] = (),
    ) -> None:
        """Before a forward pass: take in what was staged, fill slots, forget chunks, watch for rows to keep."""
        for load in loads:
            self._load(load)
        for fill in fills:
            self._fill(fill)
        for chunk in dropped:
            self._drop(chunk)
        if captures:
            self._watched = list(captures)
            self._cache.watch(torch.tensor([slot for part in captures for slot in part.slots]))

    def end(self) -> None:
        """After it: keep what was watched."""
        if not self._watched:
            return
        captures, self._watched = self._watched, []
        seen = self._cache.seen()
        if seen is None:
            self._lose([part.chunk for part in captures], "the pass that computed them did not show them")
            return
        keys_LNHd, values_LNHd = seen
        positions_N = torch.tensor([at for part in captures for at in part.positions])
        keys_LNHd = self._turned(keys_LNHd, -positions_N)
        start = 0
        for part in captures:
            stop = start + len(part.slots)
            self._keep(part, keys_LNHd[:, start:stop], values_LNHd[:, start:stop])
            start = stop

    def rows_of(self, bank: str, journal: Collection[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Each chunk of a bank's own rows: positions in its journal, position-free keys, and values `[L, N, H, d]`.

        Args:
            bank: its id.
            journal: the positions that its journal has. A chunk that has others is left out: its rows may have seen
                those that were erased.

        Raises:
            Unsupported: other workers have some of the layers or heads.
        """
        self._cache.require_whole()
        for chunk, pos in self._own(bank, journal):
            yield pos, *self._chunks[chunk]

    def kept(self, bank: str, journal: Collection[int]) -> set[int]:
        """The positions of the rows that `rows_of` gives."""
        return {at for _, pos in self._own(bank, journal) for at in pos}

    def take_lost(self) -> list[int]:
        """Chunks since the last call that can't be attended: their rows did not come."""
        lost, self._lost = self._lost, []
        return lost

    def stats(self) -> dict[str, int]:
        """The counters."""
        return asdict(self._count)

    def _own(self, bank: str, journal: Collection[int]) -> list[tuple[int, list[int]]]:
        there = set(journal)
        chunks = [(chunk, listed(pos)) for chunk, (of, pos) in list(self._sources.items()) if of == bank]
        return [(chunk, pos) for chunk, pos in chunks if pos and there.issuperset(pos)]

    def _keep(self, part: Capture, keys_LnHd: Tensor, values_LnHd: Tensor) -> None:
        if part.chunk not in self._chunks:
            shape = (len(keys_LnHd), part.rows, *keys_LnHd.shape[2:])
            self._add(part, keys_LnHd.new_zeros(shape), values_LnHd.new_zeros(shape))
        for rows_LNHd, new_LnHd in zip(self._chunks[part.chunk], (keys_LnHd, values_LnHd), strict=True):
            rows_LNHd[:, part.first : part.first + len(part.slots)] = new_LnHd
        self._count.rows_captured += len(part.slots)

    def _load(self, load: Load) -> None:
        # two attaches at once stage the same rows once
        same = [self._chunks[chunk] for chunk, name in self._loaded.items() if name == load.staged]
        rows = self._take(load.staged) or (same[0] if same else None)
        if rows is None:
            self._lose([load.chunk], "they were detached, or attached again, before their order came")
            return
        self._add(load, *rows)
        self._loaded[load.chunk] = load.staged
        self._count.rows_loaded += rows[0].shape[1]

    def _take(self, name: str) -> tuple[Tensor, Tensor] | None:
        staged = self._staged.pop(name, None)
        self._staged_of.pop(name, None)
        self._count.staged_bytes -= sum(rows.nbytes for rows in staged or ())
        return staged

    def _lose(self, chunks: Sequence[int], reason: str) -> None:
        for chunk in chunks:
            self._drop(chunk)
        self._lost += chunks
        self._count.chunks_lost += len(chunks)
        log.warning("rows of a bank are lost: attach it again", reason=reason, chunks=list(chunks))

    def _add(self, part: Capture | Load, keys_LNHd: Tensor, values_LNHd: Tensor) -> None:
        self._sources[part.chunk] = part.bank, part.pos
        self._chunks[part.chunk] = keys_LNHd, values_LNHd
        self._count.rows += keys_LNHd.shape[1]
        self._count.bytes += keys_LNHd.nbytes + values_LNHd.nbytes

    def _drop(self, chunk: int) -> None:
        self._sources.pop(chunk, None)
        self._loaded.pop(chunk, None)
        if rows := self._chunks.pop(chunk, None):
            self._count.rows -= rows[0].shape[1]
            self._count.bytes -= sum(each.nbytes for each in rows)

    def _fill(self, fill: Fill) -> None:
        chunks_N, offsets_N = torch.tensor(fill.chunks), torch.tensor(fill.offsets)
        pairs = [self._gather(chunks_N, offsets_N, part) for part in (0, 1)]
        slots_N = torch.tensor(fill.slots)
        positions_N = torch.arange(fill.first, fill.first + len(slots_N))
        self._cache.write(self._turned(pairs[0], positions_N), pairs[1], slots_N)
        self._count.fills += 1
        self._count.rows_filled += len(slots_N)

    def _turned(self, keys_LNHd: Tensor, by_N: Tensor) -> Tensor:
        rows = max(1, _SERIAL // (keys_LNHd.shape[2] * keys_LNHd.shape[3]))
        parts = zip(torch.split(keys_LNHd, rows, dim=1), torch.split(by_N, rows), strict=True)
        return torch.cat([self.rope.turn(*part) for part in parts], dim=1)

    def _gather(self, chunks_N: Tensor, offsets_N: Tensor, part: int) -> Tensor:
        rows_LNHd = self._cache.zeros(len(chunks_N))
        for chunk in torch.unique(chunks_N).tolist():
            if chunk in self._chunks:
                places_n = chunks_N == chunk
                rows_LNHd[:, places_n] = self._chunks[chunk][part][:, offsets_N[places_n]]
        return rows_LNHd
