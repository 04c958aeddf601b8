"""How far an erasure reaches: the rows that are named, those that were computed with them, and what knows of them.

A hidden state is made of all that came before it in its run, so rows after an erased one have traces of it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.inputs import TIME_END, composed
from raymem.storage.journal.journal import Journal
from raymem.storage.spellings import alike, has_others, spellings
from raymem.storage.tables.tables import quote
from raymem.types import EraseReceipt, Exposed, RowRef, Selection

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
LISTED = 64
# a condition with more names than this is slower than looking at all rows
_NAMED = 256
_NEVER = 2**63 - 1
KEPT_NAMES = "the names of stream and run, which this receipt keeps: `raymem bank receipts BANK --forget-names`"
FORGOTTEN = "salted digests of stream and run, which this receipt keeps: a guess at the name can be tried on them"
NAMED_RUNS = (
    'erase again with scope="run" (`--scope run`), naming stream, run and seq_from of each of `exposed`, which removes '
    "them."
)
FORGOTTEN_RUNS = "this receipt no longer names their runs: erase those, or the whole stream."
OUT_OF_REACH = (
    "files that were exported before",
    "copies and backups of the storage that the cold store lies on",
    "banks that rows were merged into under other names, and what readers have kept",
    "weights that were trained, and calibrations and gates that were made, on this text",
    "passes of this text that a machine's cache keeps: there, `raymem cache clear --passes`",
    KEPT_NAMES,
    "what a request that still runs, with the erased text in its context, writes to these runs from now on",
)


@dataclass(frozen=True)
class Reach:
    """The positions `gone_T`, ascending, and what is left near them; see EraseReceipt for the counts.

    `starts` are the first erased rows of the runs that were touched.
    """

    gone_T: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    starts: tuple[RowRef, ...] = ()
    followed: int = 0
    exposed: tuple[Exposed, ...] = ()
    later: int = 0


class _StreamRows(NamedTuple):
    """All rows of the streams that are touched, as columns; `run_T` and `stream_T` number the names."""

    names: pa.Table
    pos_T: Ints
    seq_T: Ints
    run_T: Ints
    stream_T: Ints


def condition(what: Selection) -> str:
    """A selection as an SQL condition on the journal's columns; see `alike` for names with several spellings."""
    parts = [alike("stream", what.stream)] if what.stream is not None else []
    parts += [alike("run", what.run)] if what.run is not None else []
    parts += [f"seq >= {what.seq_from}"] if what.seq_from is not None else []
    parts += [f"seq < {what.seq_to}"] if what.seq_to is not None else []
    if what.before is not None:
        # what is no time counts as 0: see `sound_times`
        parts += [f"(time < {what.before!r} OR NOT (time >= 0 AND time < {TIME_END}))" if what.before > 0 else "false"]
    return " AND ".join(parts)


def reach(journal: Journal, what: Selection, *, vectors: bool) -> Reach:
    """Which rows an erasure takes, and which of those that stay came after them.

    Args:
        journal: of the bank, flushed.
        what: the rows; with the scope "run" also those that followed them in their runs. A run and its first row can be
            named again after they are gone: what followed them goes then.
        vectors: whether rows carry vectors. One is made of the token that comes next, so that of the row before an
            erased one tells what was erased: that row goes too.
    """
    hit = _named(journal, what)
    streams = {*hit["stream"].to_pylist(), *(start.stream for start in what.starts)}
    rows = _rows(journal, streams | set(spellings(what.stream) if what.stream is not None else ()))
    named_T = np.isin(rows.pos_T, hit["pos"].to_numpy())
    first_R = np.full(int(rows.run_T.max(initial=-1)) + 1, _NEVER)
    np.minimum.at(first_R, rows.run_T[named_T], rows.seq_T[named_T])
    gone_T, touched_R = named_T.copy(), first_R < _NEVER
    if what.scope == "run":
        _cut(first_R, rows, what)
        gone_T |= rows.seq_T >= first_R[rows.run_T]
        touched_R = first_R < _NEVER
    followed = int(gone_T.sum() - named_T.sum())
    if vectors:
        gone_T |= _before(rows, gone_T)
    exposed_T = ~gone_T & (rows.seq_T > first_R[rows.run_T])
    return Reach(
        gone_T=rows.pos_T[gone_T],
        starts=tuple(_starts(rows, named_T, first_R)),
        followed=followed,
        exposed=tuple(_exposed(rows, exposed_T, first_R)),
        later=_later(rows, gone_T, touched_R),
    )


def is_reached(journal: Journal, what: Selection) -> bool:
    """Whether there is a row that `reach` would take."""
    if len(_named(journal, what)):
        return True
    # without one, only what followed rows that are gone already is left to take
    return what.scope == "run" and len(reach(journal, what, vectors=False).gone_T) > 0


def inherited(what: Selection, base: int) -> Selection:
    """The same selection for a fork that left at position `base`: of the cuts, those of rows that it began with."""
    return dataclasses.replace(what, starts=tuple(start for start in what.starts if start.pos < base))


def beyond(receipt: EraseReceipt, parent: str = "") -> tuple[str, ...]:
    """What no check of an erasure can reach, in words; `parent` still has the rows that a fork began with."""
    found = list(OUT_OF_REACH)
    if parent:
        found.append(f"bank {parent}, which this one began as and which has its own rows still: erase there too")
    if receipt.exposed_rows:
        more = f" The first {LISTED} runs are listed." if len(receipt.exposed) == LISTED else ""
        found.append(
            f"hidden states of {receipt.exposed_rows} later rows were computed with the erased text in their context: "
            f"{NAMED_RUNS}{more}"
        )
    if receipt.later_rows:
        found.append(
            f"{receipt.later_rows} rows came later in other runs of the same streams; whether the erased text was in "
            "their prompts, as the turns before are in a chat's, isn't known here: erase those runs or the whole stream"
        )
    if receipt.same_rows:
        found.append(
            f"{receipt.same_rows} rows that stay are the same as erased ones, token and states, under other names"
        )
    return tuple(found)


def _named(journal: Journal, what: Selection) -> pa.Table:
    """The rows that a selection names, however their labels are spelled."""
    found = journal.named(condition(what))
    for column, label in (("stream", what.stream), ("run", what.run)):
        if label is not None and has_others(label):
            found = found.filter(pc.equal(pc.utf8_normalize(found[column], "NFC"), composed(label)))
    return found


def _rows(journal: Journal, streams: set[str]) -> _StreamRows:
    listed = ", ".join(quote(stream) for stream in sorted(streams))
    where = "true" if len(streams) > _NAMED else f"stream IN ({listed})" if streams else "false"
    names = journal.named(where)
    stream_T, run_T = _numbers(names["stream"]), _numbers(names["run"])
    _, both_T = np.unique(stream_T * (int(run_T.max(initial=0)) + 1) + run_T, return_inverse=True)
    return _StreamRows(names, names["pos"].to_numpy(), names["seq"].to_numpy(), both_T, stream_T)


def _numbers(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.combine_chunks().dictionary_encode().indices.to_numpy(), dtype=np.int64)


def _cut(first_R: Ints, rows: _StreamRows, what: Selection) -> None:
    """Also begin runs where a selection says so whose rows are gone already."""
    cuts = [(start.stream, start.run, start.seq) for start in what.starts]
    if what.stream is not None and what.run is not None and what.before is None:
        cuts.append((what.stream, what.run, what.seq_from or 0))
    if not cuts:
        return
    _, places = np.unique(rows.run_T, return_index=True)
    named = rows.names.take(pa.array(places)).to_pylist()
    numbers_of = defaultdict[tuple[str, str], list[int]](list)
    for number, row in enumerate(named):
        numbers_of[composed(row["stream"]), composed(row["run"])].append(number)
    for stream, run, seq in cuts:
        for number in numbers_of.get((composed(stream), composed(run)), ()):
            first_R[number] = min(int(first_R[number]), seq)


def _before(rows: _StreamRows, gone_T: Mask) -> Mask:
    """The rows that stay directly before one that goes."""
    order_T = np.lexsort((rows.seq_T, rows.run_T))
    run_T, seq_T, gone = rows.run_T[order_T], rows.seq_T[order_T], gone_T[order_T]
    next_T = (run_T[:-1] == run_T[1:]) & (seq_T[:-1] + 1 == seq_T[1:])
    found_T = np.zeros(len(order_T), dtype=np.bool_)
    found_T[order_T[:-1]] = next_T & gone[1:] & ~gone[:-1]
    return found_T


def _starts(rows: _StreamRows, named_T: Mask, first_R: Ints) -> list[RowRef]:
    at = np.flatnonzero(named_T & (rows.seq_T == first_R[rows.run_T]))
    found = rows.names.take(pa.array(at)).to_pylist()
    return [RowRef(row["stream"], row["run"], row["seq"], row["pos"]) for row in found]


def _exposed(rows: _StreamRows, exposed_T: Mask, first_R: Ints) -> list[Exposed]:
    """By run, the runs with the most rows first."""
    runs, places, counts = np.unique(rows.run_T[exposed_T], return_index=True, return_counts=True)
    named = rows.names.take(pa.array(np.flatnonzero(exposed_T)[places]))
    found = [
        Exposed(stream, run, int(first_R[number]), int(count))
        for stream, run, number, count in zip(
            named["stream"].to_pylist(), named["run"].to_pylist(), runs, counts, strict=True
        )
    ]
    return sorted(found, key=lambda each: -each.rows)


def _later(rows: _StreamRows, gone_T: Mask, touched_R: Mask) -> int:
    """How many rows of runs that were not touched came after the first erased row of their stream."""
    if not gone_T.any():
        return 0
    first_S = np.full(int(rows.stream_T.max()) + 1, _NEVER)
    np.minimum.at(first_S, rows.stream_T[gone_T], rows.pos_T[gone_T])
    return int((~touched_R[rows.run_T] & (rows.pos_T > first_S[rows.stream_T])).sum())
