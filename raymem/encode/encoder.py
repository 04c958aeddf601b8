"""One bank's encoder: journal rows in, keys paired with the tokens that followed them out.

A pure function of the journal's order: cutting the same rows into other calls gives the same rows, bit for bit.

Shape legend: `T` rows of a call, `N` rows completed, `Q` queries, `L` layers, `D` hidden width, `V` value width,
`K` key width.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from raymem.encode.calibration import Calibration, Range
from raymem.encode.keys import Floats, KeyMaker
from raymem.encode.open_runs import Ints, OpenRuns, RowColumns, RunShape, SortedRows, checked, join
from raymem.errors import Corrupt, FingerprintMismatch, InvalidSpec, InvalidTrace
from raymem.inputs import Known
from raymem.memory import build
from raymem.memory.base import Dims, EncodedRows, Memory
from raymem.memory.learned import Learned
from raymem.memory.state import StateMemory
from raymem.rows import JournalRows
from raymem.types import DTYPES, BankSpec

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
        self._known = Known()
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
        return (stream, run) if (stream, run) in self._source_of else self._known.get((stream, run))

    def relevance(self, similarity_Q: Tensor) -> Tensor:
        """How much each query concerns the bank, float32 [Q] in 0 to 1: `clip((s - lo) / (hi - lo), 0, 1)`.

        Args:
            similarity_Q: the query's best cosine with the keys held, -1 for an empty bank; `lo` and `hi` are the
                calibration's range of this bank's key function.
        """
        lo, hi = self._range
        return ((similarity_Q - lo) / (hi - lo)).clamp(0.0, 1.0)

    def keys(self, hidden_QLD: Tensor, start: int = 1) -> Tensor:
        """Keys [Q, K] of queries: consecutive states of one context, `start` the position of the first.

        A window at the first queries is the mean over those that are there. A query at position 0 is a row of zeros,
        whose cosine with everything is 0.
        """
        return self._maker.of_run(hidden_QLD, start)

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
        self._next_seq, self._known = next_seq, Known(source_of)

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
            self._known.add(pair)
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
