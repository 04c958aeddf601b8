"""One bank's encoder: journal rows in, keys paired with the tokens that followed them out.

A pure function of the journal's order: cutting the same rows into other calls gives the same rows, bit for bit.

Shape legend: `T` rows of a call, `N` rows completed, `Q` queries, `L` layers, `D` hidden width, `V` value width,
`K` key width.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymem.encode.calibration import Calibration
from raymem.encode.keys import Floats
from raymem.encode.maker import KeyMaker
from raymem.encode.merge import Batch, Ints, Merged, merge
from raymem.encode.open_runs import OpenRuns, Sizes, checked
from raymem.errors import Corrupt, FingerprintMismatch, InvalidTrace
from raymem.inputs import Known
from raymem.memory.base import Rows
from raymem.rows import JournalRows
from raymem.types import DTYPES, BankSpec

_TAIL_ROWS = 2**16
_FEWEST_RUNS = 16


class Encoder:
    """Streaming encoder of one bank.

    A row (stream, run, seq) becomes a memory row when the next one of its run arrives: its key is made of its state
    (and of the rows before it, for windows), its token is the next row's, its vector value is its own, zeros where
    none was written. The last row of every run waits. A gap in seq breaks both pairing and windows. The row at seq 0
    is the attention sink: it has no key and enters no window.

    At most `max_open_runs` runs are kept open. Of the run untouched for the longest, the waiting row and the window
    are dropped, as if a gap followed; `sources` and `next_seq` stay for good.

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
        _require(spec, calibration)
        self.calibration = calibration
        self._maker = KeyMaker(calibration, spec.key, spec.fingerprint.layers)
        self.key = self._maker.key
        self.key_width = self._maker.width
        self.value_width = spec.fingerprint.width if spec.fingerprint.values else 0
        self._span = self._maker.window if spec.key.function == "span" else 1
        self._open_runs = OpenRuns(
            min(max_open_runs, max(_FEWEST_RUNS, _TAIL_ROWS // self._maker.window)),
            Sizes(
                layers=len(self.key.layers),
                width=calibration.width,
                value_width=self.value_width,
                window=self._maker.window,
                dtype=DTYPES[spec.fingerprint.dtype],
            ),
        )
        self._sources: dict[tuple[str, str], int] = {}
        self._known = Known()
        self._next_seq: list[int] = []

    @property
    def sources(self) -> list[tuple[str, str]]:
        """Every (stream, run) seen, in order of appearance: what `Rows.source_N` indexes."""
        return list(self._sources)

    @property
    def nbytes(self) -> int:
        """Bytes of the states and values kept for open runs."""
        return self._open_runs.nbytes

    def next_seq(self, stream: str, run: str) -> int:
        """The seq that continues a run without a gap; 0 for a new run."""
        source = self._sources.get((stream, run))
        return 0 if source is None else self._next_seq[source]

    def spelling(self, stream: str, run: str) -> tuple[str, str]:
        """The name under which the rows of a run are there already, in whatever Unicode form, or the name itself."""
        return (stream, run) if (stream, run) in self._sources else self._known.get((stream, run))

    def relevance(self, similarity_Q: Tensor) -> Tensor:
        """The calibration's relevance for this bank's key function."""
        return self.calibration.relevance(similarity_Q, self.key)

    def keys(self, hidden_QLD: Tensor, start: int = 1) -> Tensor:
        """Keys [Q, K] of queries: consecutive states of one context, `start` the position of the first.

        A window at the first queries is the mean over those that are there. A query at position 0 is a row of zeros,
        whose cosine with everything is 0.
        """
        return self._maker.of_run(hidden_QLD, start)

    def push(self, rows: JournalRows) -> Rows:
        """Take the journal's next rows and return those that they complete, in the order of completion.

        Raises:
            InvalidTrace: vector values of another width than the bank's; nothing was changed.
        """
        value_TV, bits_TLD = self._values(rows), self._maker.pick(rows.hidden_TLD)
        source_T = self._register(rows)
        carried, fresh_T = self._open_runs.walk(source_T)
        merged = merge(
            carried,
            Batch(
                source_T=source_T,
                seq_T=rows.seq_T.numpy(),
                pos_T=rows.pos_T.numpy(),
                token_T=rows.token_T.numpy(),
                bits_TLD=bits_TLD,
                value_TV=value_TV,
                fresh_T=fresh_T,
            ),
        )
        found = self._completed(merged)
        self._keep(merged)
        return found

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The whole state: tensors, and plain data for JSON; `load` gives the same bits back."""
        tensors = {"next_seq": torch.tensor(self._next_seq, dtype=torch.int64), **self._open_runs.dump()}
        return tensors, {"sources": [list(source) for source in self._sources]}

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take over the state that `dump` gave.

        Raises:
            Corrupt: the parts do not fit each other or this bank; nothing was changed.
        """
        sources = _sources(meta)
        next_seq = checked(tensors, "next_seq", torch.int64, (len(sources),)).tolist()
        self._open_runs.load(tensors, len(sources))
        self._sources, self._next_seq, self._known = sources, next_seq, Known(sources)

    def _values(self, rows: JournalRows) -> Floats:
        given_TV, width = rows.value_TV, self.value_width
        if given_TV is None or not width:
            return np.zeros((len(rows), width), dtype=np.float32)
        if given_TV.shape[1] != width:
            raise InvalidTrace(f"values are {given_TV.shape[1]} wide; this bank's output embedding is {width} wide")
        values_TV: Floats = given_TV.numpy()
        return values_TV

    def _register(self, rows: JournalRows) -> Ints:
        known = self._sources
        found = [known.setdefault(pair, len(known)) for pair in zip(rows.streams, rows.runs, strict=True)]
        new = len(known) - len(self._next_seq)
        for pair in itertools.islice(reversed(known), new):
            self._known.add(pair)
        self._next_seq.extend([0] * new)
        return np.array(found, dtype=np.int64)

    def _completed(self, merged: Merged) -> Rows:
        rows, done_N = merged.rows, merged.completed(self._span)
        return Rows(
            keys_NK=self._maker.make(rows.bits_TLD, merged.ages_M, done_N),
            tokens_N=torch.from_numpy(rows.token_T[done_N + 1]),
            values_NV=torch.from_numpy(rows.value_TV[done_N]) if self.value_width else None,
            pos_N=torch.from_numpy(rows.pos_T[done_N]),
            seq_N=torch.from_numpy(rows.seq_T[done_N]),
            source_N=torch.from_numpy(rows.source_T[done_N]),
        )

    def _keep(self, merged: Merged) -> None:
        for source, last in merged.ends():
            self._next_seq[source] = int(merged.rows.seq_T[last]) + 1
            if source in self._open_runs:
                self._open_runs.keep(source, merged.tail(last, self._maker.window))


def _require(spec: BankSpec, calibration: Calibration) -> None:
    fingerprint = spec.fingerprint
    # a calibration that an earlier release made names the model by the hash of that time
    content = calibration.model if calibration.model in fingerprint.content_hashes() else fingerprint.content
    wanted = {"calibration": fingerprint.calibration, "model": content, "width": fingerprint.width}
    given = {"calibration": calibration.hash, "model": calibration.model, "width": calibration.width}
    wrong = [
        f"{name}: bank has {wanted[name]!r}, got {given[name]!r}" for name in wanted if wanted[name] != given[name]
    ]
    if wrong:
        raise FingerprintMismatch(
            f"this calibration is not the bank's ({'; '.join(wrong)}); load the one that its fingerprint names",
            fields=[line.split(":")[0] for line in wrong],
        )


def _sources(meta: dict[str, Any]) -> dict[tuple[str, str], int]:
    listed = meta.get("sources")
    if not isinstance(listed, list) or not all(_is_pair(pair) for pair in listed):
        raise Corrupt(f"an encoder's sources are pairs of names, not {str(listed)[:80]!r}: its state is damaged")
    found = {(stream, run): index for index, (stream, run) in enumerate(listed)}
    if len(found) < len(listed):
        raise Corrupt(f"an encoder's state names {len(listed) - len(found)} runs twice: it is damaged")
    return found


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
