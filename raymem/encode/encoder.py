"""One bank's encoder: journal rows in, keys paired with the tokens that followed them out.

A pure function of the journal's order: cutting the same rows into other calls gives the same rows, bit for bit.

Open runs are the last rows of each run, which pairing and windows still need; new rows are laid behind them.

Shape legend: `T` rows of a call, `M` new and kept rows sorted by run, `N` rows completed, `n` kept rows of one run,
`R` kept rows of all runs, `O` open runs, `Q` queries, `L` layers, `D` hidden width, `V` value width, `K` key width.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.encode.calibration import Calibration, Range
from raymem.encode.keys import Array, ContextRows, Floats, KeyMaker, ages
from raymem.errors import Corrupt, FingerprintMismatch, InvalidSpec, InvalidTrace
from raymem.inputs import composed
from raymem.memory import build
from raymem.memory.base import Dims, EncodedRows, Memory
from raymem.memory.learned import Learned
from raymem.memory.state import StateMemory
from raymem.rows import JournalRows
from raymem.tensors import from_bits, to_bits
from raymem.types import DTYPES, BankSpec

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_OPEN_ROWS = 2**16
_FEWEST_RUNS = 16


class Encoder:
    """Streaming encoder of one bank.

    A row (stream, run, seq) becomes a memory row when the next one of its run arrives: its key is made of its state
    (and of the rows before it, for windows), its token is the next row's, its vector value is its own, zeros where
    none was written. The last row of every run waits. A gap in seq breaks both pairing and windows. The row at seq 0
    is the attention sink: it has no key and enters no window.

    At most `max_open_runs` runs are kept open. Of the run untouched for the longest, the waiting row and the window
    are dropped, as if a gap followed; `sources` and `next_seq` stay for good.

    `sources` lists every (stream, run) seen, in order of appearance: what `EncodedRows.source_N` indexes. It only
    grows, but for `load`, which puts another list in its place.

    Args:
        spec: the bank's spec; its fingerprint names the calibration.
        calibration: made for the fingerprint's model and, at least, its layers.
        max_open_runs: part of what the bank is: change it and a replay may differ. Windows of more than 64 rows lower
            it, to keep at most 65,536 rows.

    Raises:
        FingerprintMismatch: another calibration, or one of another model or width.
        InvalidSpec: the key wants layers that aren't there.
    """

    def __init__(self, spec: BankSpec, calibration: Calibration, *, max_open_runs: int = 1024) -> None:
        fingerprint = spec.fingerprint
        # a calibration that an earlier release made names the model by the hash of that time
        old = fingerprint.legacy is not None and calibration.model == fingerprint.legacy[0]
        content = calibration.model if old else fingerprint.content
        wanted = {"calibration": fingerprint.calibration, "model": content, "width": fingerprint.width}
        given = {"calibration": calibration.hash, "model": calibration.model, "width": calibration.width}
        if wrong := [name for name in wanted if wanted[name] != given[name]]:
            said = "; ".join(f"{name}: bank has {wanted[name]!r}, got {given[name]!r}" for name in wrong)
            raise FingerprintMismatch(
                f"this calibration is not the bank's ({said}); load the one that its fingerprint names", fields=wrong
            )
        self.calibration = calibration
        self._maker = KeyMaker(calibration, spec.key, fingerprint.layers)
        self.key = self._maker.key
        self.key_width = self._maker.width
        self.value_width = fingerprint.width if fingerprint.values else 0
        self._span = self._maker.window if spec.key.function == "span" else 1
        self._open_runs = OpenRuns(
            min(max_open_runs, max(_FEWEST_RUNS, _OPEN_ROWS // self._maker.window)),
            RunShape(
                layers=len(self.key.layers),
                width=calibration.width,
                value_width=self.value_width,
                window=self._maker.window,
                dtype=DTYPES[fingerprint.dtype],
            ),
        )
        self.sources: list[tuple[str, str]] = []
        self._source_of: dict[tuple[str, str], int] = {}
        self._spellings = RunSpellings()
        self._next_seq: list[int] = []

    @cached_property
    def _range(self) -> Range:
        return self.calibration.range_of(self.key)

    @property
    def nbytes(self) -> int:
        """Bytes of the states and values kept for open runs."""
        return self._open_runs.nbytes

    def next_seq(self, stream: str, run: str) -> int:
        """The seq that continues a run without a gap; 0 for a new run."""
        source = self._source_of.get((stream, run))
        return 0 if source is None else self._next_seq[source]

    def spelling(self, stream: str, run: str) -> tuple[str, str]:
        """The name under which the rows of a run are there already, in whatever Unicode form, or the name itself."""
        return (stream, run) if (stream, run) in self._source_of else self._spellings.get((stream, run))

    def relevance(self, similarity_Q: Tensor) -> Tensor:
        """How much each query concerns the bank, float32 [Q] in 0 to 1: `clip((s - lo) / (hi - lo), 0, 1)`.

        Args:
            similarity_Q: the query's best cosine with the keys held, -1 for an empty bank; `lo` and `hi` are the
                calibration's range of this bank's key function.
        """
        lo, hi = self._range
        return ((similarity_Q - lo) / (hi - lo)).clamp(0.0, 1.0)

    def keys(self, contexts: Sequence[ContextRows]) -> Tensor:
        """Keys [Q, K] of the rows that ask, one context after the other.

        A window at a context's first states is the mean over those that are there. A query at position 0 is a row of
        zeros, whose cosine with everything is 0.
        """
        return self._maker.of_contexts(contexts)

    def push(self, rows: JournalRows) -> EncodedRows:
        """Take the journal's next rows and return those that they complete, in the order of completion.

        Raises:
            InvalidTrace: vector values of another width than the bank's; nothing was changed.
        """
        value_TV, bits_TLD = self._values(rows), self._maker.pick(rows.hidden_TLD)
        source_T = self._register(rows)
        continued, fresh_T = self._open_runs.walk(source_T)
        new = RowColumns(
            source_T=source_T,
            seq_T=rows.seq_T.numpy(),
            pos_T=rows.pos_T.numpy(),
            token_T=rows.token_T.numpy(),
            bits_TLD=bits_TLD,
            value_TV=value_TV,
            fresh_T=fresh_T,
        )
        joined = join(continued, new)
        found = self._completed(joined)
        for source, last in joined.ends():
            self._next_seq[source] = int(joined.rows.seq_T[last]) + 1
            if source in self._open_runs:
                self._open_runs.keep(source, joined.open_run(last, self._maker.window))
        return found

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The whole state: tensors, and plain data for JSON; `load` gives the same bits back."""
        tensors = {"next_seq": torch.tensor(self._next_seq, dtype=torch.int64), **self._open_runs.dump()}
        return tensors, {"sources": [list(source) for source in self.sources]}

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take over the state that `dump` gave.

        Raises:
            Corrupt: the parts do not fit each other or this bank; nothing was changed.
        """
        listed = meta.get("sources")
        if not isinstance(listed, list) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
            for pair in listed
        ):
            raise Corrupt(f"an encoder's sources are pairs of names, not {str(listed)[:80]!r}: its state is damaged")
        source_of = {(stream, run): index for index, (stream, run) in enumerate(listed)}
        if len(source_of) < len(listed):
            raise Corrupt(f"an encoder's state names {len(listed) - len(source_of)} runs twice: it is damaged")
        next_seq = checked(tensors, "next_seq", torch.int64, (len(source_of),)).tolist()
        self._open_runs.load(tensors, len(source_of))
        self.sources, self._source_of = list(source_of), source_of
        self._next_seq, self._spellings = next_seq, RunSpellings(source_of)

    def _values(self, rows: JournalRows) -> Floats:
        given_TV, width = rows.value_TV, self.value_width
        if given_TV is None or not width:
            return np.zeros((len(rows), width), dtype=np.float32)
        if given_TV.shape[1] != width:
            raise InvalidTrace(f"values are {given_TV.shape[1]} wide; this bank's output embedding is {width} wide")
        values_TV: Floats = given_TV.numpy()
        return values_TV

    def _register(self, rows: JournalRows) -> Ints:
        source_of = self._source_of
        found = [source_of.setdefault(pair, len(source_of)) for pair in zip(rows.streams, rows.runs, strict=True)]
        for pair in list(itertools.islice(reversed(source_of), len(source_of) - len(self.sources)))[::-1]:
            self.sources.append(pair)
            self._spellings.add(pair)
            self._next_seq.append(0)
        return np.array(found, dtype=np.int64)

    def _completed(self, joined: SortedRows) -> EncodedRows:
        rows, done_N = joined.rows, joined.completed(self._span)
        return EncodedRows(
            keys_NK=self._maker.make(rows.bits_TLD, joined.ages_M, done_N),
            tokens_N=torch.from_numpy(rows.token_T[done_N + 1]),
            values_NV=torch.from_numpy(rows.value_TV[done_N]) if self.value_width else None,
            pos_N=torch.from_numpy(rows.pos_T[done_N]),
            seq_N=torch.from_numpy(rows.seq_T[done_N]),
            source_N=torch.from_numpy(rows.source_T[done_N]),
        )


def assemble(spec: BankSpec, calibration: Calibration, learned: Learned | None = None) -> tuple[Encoder, Memory]:
    """The encoder and the mechanism that a spec asks for, with the weights that it names.

    Raises:
        InvalidSpec: unknown kind, option or layer, a budget too small, weights that don't fit, naming the value.
        FingerprintMismatch: the calibration belongs to another model or other layers.
    """
    encoder = Encoder(spec, calibration)
    return encoder, mechanism(spec, encoder.key_width, learned)


def mechanism(spec: BankSpec, key_width: int, learned: Learned | None = None) -> Memory:
    """The mechanism alone, for keys of this width; see `assemble`."""
    # vector values live in the output-embedding space, which is as wide as the hidden states
    dims = Dims(key_width, spec.fingerprint.width if spec.fingerprint.values else 0)
    memory = build(spec.kind, dims, spec.options, spec.budget_bytes)
    if isinstance(memory, StateMemory):
        # a bounded state is allocated whole at once
        needed, there = sum(each.nbytes for each in memory.state_spec().values()), psutil.virtual_memory().total
        if needed > there:
            raise InvalidSpec(
                f"a {spec.kind} bank of these options takes {needed:,} bytes and this machine has {there:,}; lower "
                f"budget_bytes, which is {spec.budget_bytes:,}"
            )
    if learned is not None:
        learned.load_into(memory)
    return memory


@dataclass(frozen=True)
class OpenRun:
    """A run's last consecutive rows, at most a window of them; none when only its attention sink has come.

    `seq`, `pos` and `value_V` are those of the last row, which waits for its next token.
    """

    bits_nLD: Array
    seq: int
    pos: int
    value_V: Floats

    def __len__(self) -> int:
        return len(self.bits_nLD)


@dataclass(frozen=True)
class RunShape:
    """What a bank fixes about each of its open runs: layers, widths, rows at most (`window`), the states' dtype."""

    layers: int
    width: int
    value_width: int
    window: int
    dtype: torch.dtype


class OpenRuns:
    """A bank's open runs, the one touched longest ago first; at most `capacity` of them.

    A state on disk has them as the tensors `tail_hidden`, `tail_values` and `tail_runs`.
    """

    def __init__(self, capacity: int, shape: RunShape) -> None:
        self._capacity = capacity
        self._shape = shape
        # None between `walk` and `keep`
        self._open: OrderedDict[int, OpenRun | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, source: int) -> bool:
        return source in self._open

    @property
    def nbytes(self) -> int:
        """Bytes of states and values held."""
        return sum(run.bits_nLD.nbytes + run.value_V.nbytes for run in self._open.values() if run is not None)

    def walk(self, source_T: Ints) -> tuple[dict[int, OpenRun], Bools]:
        """Touch runs in the order of their rows, closing the least recent one whenever there are too many.

        A run closes where it would if the rows came one by one. A `keep` must follow for each of these runs that is
        still open.

        Returns:
            The open runs that these rows continue, and for each row whether it starts afresh, its run not being open.
        """
        continued: dict[int, OpenRun] = {}
        fresh_T = np.zeros(len(source_T), dtype=np.bool_)
        changes = np.flatnonzero(source_T[1:] != source_T[:-1]) + 1
        for start in [0, *changes.tolist()] if len(source_T) else []:
            source = int(source_T[start])
            if source in self._open:
                self._open.move_to_end(source)
                run = self._open[source]
                if run is not None:
                    continued[source] = run
            else:
                fresh_T[start] = True
            self._open[source] = None
            if len(self._open) > self._capacity:
                self._open.popitem(last=False)
        return continued, fresh_T

    def keep(self, source: int, run: OpenRun) -> None:
        """Set an open run's rows; its place in the order stays."""
        self._open[source] = run

    def dump(self) -> dict[str, Tensor]:
        """All open runs as tensors, in order."""
        shape = self._shape
        runs: list[tuple[int, OpenRun]] = []
        for source, run in self._open.items():
            assert run is not None, "walk was not followed by keep"
            runs.append((source, run))
        empty = to_bits(torch.zeros(0, shape.layers, shape.width, dtype=shape.dtype))
        values = np.array([run.value_V for _, run in runs], dtype=np.float32).reshape(len(runs), shape.value_width)
        origins = [[source, len(run), run.seq, run.pos] for source, run in runs]
        return {
            "tail_hidden": from_bits(np.concatenate([empty, *(run.bits_nLD for _, run in runs)])),
            "tail_values": torch.from_numpy(values),
            "tail_runs": torch.tensor(origins, dtype=torch.int64).reshape(len(runs), 4),
        }

    def load(self, tensors: dict[str, Tensor], sources: int) -> None:
        """Take over what `dump` gave, for a bank of so many sources.

        Raises:
            Corrupt: a tensor is missing or does not fit; nothing was changed.
        """
        shape = self._shape
        runs_O4 = checked(tensors, "tail_runs", torch.int64, (None, 4))
        source_O, rows_O = runs_O4[:, 0], runs_O4[:, 1]
        values_OV = checked(tensors, "tail_values", torch.float32, (len(runs_O4), shape.value_width))
        rows = int(rows_O.sum())
        hidden_RLD = checked(tensors, "tail_hidden", shape.dtype, (rows, shape.layers, shape.width))
        if bool(((source_O < 0) | (source_O >= sources)).any()) or len(set(source_O.tolist())) < len(source_O):
            raise Corrupt(f"open runs {source_O.tolist()[:8]} of an encoder with {sources} runs: its state is damaged")
        if bool(((rows_O < 0) | (rows_O > shape.window)).any()) or len(runs_O4) > self._capacity:
            raise Corrupt(
                f"{len(runs_O4)} open runs of up to {rows_O.max()} rows; this bank keeps at most "
                f"{self._capacity} of {shape.window}: the state is damaged or another bank's"
            )
        bits_RLD, found, first = to_bits(hidden_RLD), OrderedDict[int, OpenRun | None](), 0
        for (source, kept, seq, pos), value_V in zip(runs_O4.tolist(), values_OV.numpy(), strict=True):
            found[source] = OpenRun(bits_RLD[first : first + kept].copy(), seq, pos, value_V.copy())
            first += kept
        self._open = found


def checked(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """A tensor of this dtype and shape (None: any).

    Raises:
        Corrupt: it is missing or another.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise Corrupt(f"the encoder's state lacks {name!r}; it has {sorted(tensors)}")
    fits = len(tensor.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        raise Corrupt(f"the encoder's {name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
    return tensor


@dataclass(frozen=True)
class RowColumns:
    """Rows of several runs as arrays; `fresh_T` marks rows that don't continue the rows of their run before them."""

    source_T: Ints
    seq_T: Ints
    pos_T: Ints
    token_T: Ints
    bits_TLD: Array
    value_TV: Floats
    fresh_T: Bools


@dataclass(frozen=True)
class SortedRows:
    """New rows behind the open runs that they continue, sorted by run and, within a run, in order.

    `order_M` is each row's place before sorting: the first `kept` are rows of open runs. `breaks_M` marks rows that
    don't follow the row before them, `ages_M` says how many rows a window may hold at each (see `keys.ages`).
    """

    rows: RowColumns
    order_M: Ints
    kept: int
    breaks_M: Bools
    ages_M: Ints

    def completed(self, span: int) -> Ints:
        """Indices of the rows whose next token is among the new rows, in the order in which those tokens came.

        Args:
            span: only rows that end a span of this many.
        """
        seq_M = self.rows.seq_T
        follows_M = ~self.breaks_M[1:] & (seq_M[:-1] != 0) & (self.order_M[1:] >= self.kept)
        done_N = np.flatnonzero(follows_M & ((seq_M[:-1] + 1) % span == 0))
        return done_N[np.argsort(self.order_M[done_N + 1])]

    def ends(self) -> list[tuple[int, int]]:
        """Each run and the index of its last row."""
        source_M = self.rows.source_T
        last_S = np.flatnonzero(np.append(source_M[1:] != source_M[:-1], True)[: len(source_M)])
        return list(zip(source_M[last_S].tolist(), last_S.tolist(), strict=True))

    def open_run(self, last: int, window: int) -> OpenRun:
        """The open run that ends with row `last`: a copy of its last rows."""
        rows = self.rows
        first = last + 1 - min(int(self.ages_M[last]), window)
        bits_nLD, value_V = rows.bits_TLD[first : last + 1].copy(), rows.value_TV[last].copy()
        return OpenRun(bits_nLD, int(rows.seq_T[last]), int(rows.pos_T[last]), value_V)


def join(open_runs: Mapping[int, OpenRun], new: RowColumns) -> SortedRows:
    """Lay new rows behind the open runs that they continue."""
    parts = [*(_columns_of(source, run) for source, run in open_runs.items()), new]
    names, rows = RowColumns.__dataclass_fields__, new
    if len(parts) > 1:
        rows = RowColumns(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    kept = len(rows.source_T) - len(new.source_T)
    order_M = np.arange(len(rows.source_T))
    if bool((rows.source_T[1:] < rows.source_T[:-1]).any()):
        order_M = np.argsort(rows.source_T, kind="stable")
        rows = RowColumns(*(getattr(rows, name)[order_M] for name in names))
    breaks_M = rows.fresh_T.copy()
    breaks_M[:1] = True
    breaks_M[1:] |= (rows.source_T[1:] != rows.source_T[:-1]) | (rows.seq_T[1:] != rows.seq_T[:-1] + 1)
    return SortedRows(rows, order_M, kept, breaks_M, ages(breaks_M, rows.seq_T == 0))


def _columns_of(source: int, run: OpenRun) -> RowColumns:
    rows = len(run)
    # tokens of kept rows, and values and positions of all but the last one, have been used already
    value_nV = np.zeros((rows, len(run.value_V)), dtype=np.float32)
    value_nV[rows - 1 :] = run.value_V
    return RowColumns(
        source_T=np.full(rows, source),
        seq_T=np.arange(run.seq + 1 - rows, run.seq + 1),
        pos_T=np.full(rows, run.pos),
        token_T=np.full(rows, -1),
        bits_TLD=run.bits_nLD,
        value_TV=value_nV,
        fresh_T=np.zeros(rows, dtype=np.bool_),
    )


class RunSpellings:
    """Names of runs, (stream, run), of which some are spelled as raymem no longer does."""

    def __init__(self, names: Iterable[tuple[str, str]] = ()) -> None:
        self._odd: dict[tuple[str, str], tuple[str, str]] = {}
        for name in names:
            self.add(name)

    def add(self, name: tuple[str, str]) -> None:
        """Remember a name, if it is spelled in another way."""
        if not (name[0].isascii() and name[1].isascii()):
            usual = (composed(name[0]), composed(name[1]))
            if usual != name:
                self._odd[usual] = name

    def get(self, name: tuple[str, str]) -> tuple[str, str]:
        """The name under which the rows of a run are there already, or the name itself."""
        return self._odd.get(name, name)
