"""What choosing rows of a bank looks at: one layer's states of the rows of its journal, kept in memory once asked for.

Shape legend: `T` rows, `L` layers, `D` hidden width, `Q` queries, `N` rows that are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raymem.encode.calibration import Calibration
from raymem.errors import Corrupt, InvalidInput, StoreClosed
from raymem.logs import get_logger
from raymem.memory.base import Shown
from raymem.memory.choice import SINKS, Held
from raymem.memory.showing import Asked, choose_shown
from raymem.rows import JournalRows
from raymem.storage.journal.journal import Journal
from raymem.storage.store import ColdStore, Entry
from raymem.types import AttendQuery, Fingerprint, MemoryTokens

# a bank's first rows; it doubles when it is full
_FIRST_ROWS = 1024
_ANSWER_BYTES = 2**30
_log = get_logger(__name__)
_SHAPES = {"keys": "LNHd", "values": "LNHd", "key_scales": "LNH", "value_scales": "LNH"}


class HeldColumns(NamedTuple):
    """Of each row: the centred state of unit length in bfloat16, token, run, number in its run, journal position."""

    state_TD: Tensor
    token_T: Tensor
    run_T: Tensor
    seq_T: Tensor
    pos_T: Tensor

    @classmethod
    def empty(cls, rows: int, width: int) -> HeldColumns:
        ints = (torch.empty(rows, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.int64, torch.int64))
        return cls(torch.empty(rows, width, dtype=torch.bfloat16), *ints)


class HeldRows:
    """Rows that may be chosen, a run's one after the other, and what their bank says of them.

    Args:
        columns: of these rows; there may be states of others.
        sources: stream and run, by the runs' numbers.
        state_T: where each row's state is; None where states are in the order of the rows.
        shown: what the bank shows of its rows.
    """

    def __init__(
        self,
        columns: HeldColumns,
        sources: Sequence[tuple[str, str]],
        state_T: Tensor | None = None,
        shown: Shown | None = None,
    ) -> None:
        self._columns = columns
        self._sources = sources
        self._state_T = state_T
        self._shown = shown

    def encoded(self, span: int) -> Tensor:
        """Positions of those that the encoder has given to the mechanism, in that order; see `Encoder.push`.

        Args:
            span: of so many rows of a run it has given the last.
        """
        _, _, run_T, seq_T, pos_T = self._columns
        follows_T = (run_T[1:] == run_T[:-1]) & (seq_T[1:] == seq_T[:-1] + 1) & (seq_T[:-1] != 0)
        done_N = torch.nonzero(follows_T & (seq_T[1:] % span == 0))[:, 0]
        # the next row of its run completes a row
        return pos_T[done_N[pos_T[done_N + 1].argsort()]]

    def left(self, given_N: Tensor, shown: Shown, span: int) -> HeldRows:
        """Those that a bank shows, given which it got (see `encoded`), and what these stand for; runs' first stay."""
        stay_N = torch.cat([shown.fine_N, shown.coarse_M]).cpu()
        evicted_M = given_N[~torch.isin(given_N, stay_N)]
        if not len(evicted_M):
            return HeldRows(self._columns, self._sources, self._state_T, shown)
        states, _, run_T, seq_T, pos_T = self._columns
        _, span_T = torch.unique(torch.stack([run_T.long(), seq_T // span], 1), dim=0, return_inverse=True)
        gone_T = torch.isin(span_T, span_T[torch.isin(pos_T, evicted_M)]) & (seq_T >= SINKS)
        state_T = torch.arange(len(pos_T)) if self._state_T is None else self._state_T
        columns = HeldColumns(states, *(column[~gone_T] for column in self._columns[1:]))
        return HeldRows(columns, self._sources, state_T[~gone_T], shown)

    def choose(self, query: AttendQuery, query_QD: Tensor | None, kind: str) -> tuple[MemoryTokens, Tensor]:
        """The rows that a query chooses, without keys and values, but with their states; and their places here [N].

        Args:
            query: says how many, and how.
            query_QD: its states as they are compared; see `HeldStates.unit`.
            kind: the bank's.
        """
        states, token_T, run_T, seq_T, pos_T = self._columns
        tokens_Q = torch.zeros(0, dtype=torch.int64) if query.tokens_Q is None else query.tokens_Q
        # they are much the largest part, and only a question in states looks at all of them
        ordered = states if self._state_T is None or query_QD is None else states[self._state_T]
        held = Held(None if query_QD is None else ordered, token_T.long(), run_T.long(), pos_T)
        choice = choose_shown(held, Asked(query.rows, query_QD, tokens_Q, query.method), kind, self._shown)
        used, source_N = torch.unique(run_T[choice.place_N], return_inverse=True)
        chosen = MemoryTokens(
            pos_N=choice.pos_N,
            tokens_N=held.tokens_T[choice.place_N],
            seq_N=seq_T[choice.place_N],
            source_N=source_N,
            sources=tuple(self._sources[run] for run in used.tolist()),
            relevance=choice.relevance,
            kind=kind,
            states_ND=states[choice.place_N if self._state_T is None else self._state_T[choice.place_N]],
        )
        return chosen, choice.place_N


class HeldStates:
    """One layer's states of a journal's rows, followed as the journal grows.

    Args:
        calibration: of the bank; its mean is taken off the states.
        layer: which, counted from 1; one of the calibration's.
    """

    def __init__(self, calibration: Calibration, layer: int) -> None:
        self.layer = layer
        self.sources: list[tuple[str, str]] = []
        self._source_of: dict[tuple[str, str], int] = {}
        self._index = calibration.layers.index(layer)
        self._mean_D = calibration.mean_LD[self._index]
        self._columns = HeldColumns.empty(0, calibration.width)
        self._count = 0
        self._end = 0

    @staticmethod
    def row_bytes(width: int) -> int:
        """Bytes of a row of hidden width `width`."""
        return sum(column.nbytes for column in HeldColumns.empty(1, width))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(column.nbytes for column in self._columns)

    def follow(self, journal: Journal, upto: int, wanted: Callable[[], bool]) -> None:
        """Take the rows of the bank's journal before position `upto` that are not here yet.

        Raises:
            StoreClosed: it is no longer `wanted`. Corrupt: as the journal's `scan`.
        """
        if self._end >= upto:
            return
        for rows in journal.scan(self._end, upto):
            if not wanted():
                raise StoreClosed("this store is being closed; connect again, and ask again")
            self._add(rows)
        # the last may have been erased
        self._end = upto

    def unit(self, hidden_QLD: Tensor) -> Tensor:
        """States of all layers [Q, L, D] as they are compared: of this one, centred, unit length, float32 [Q, D]."""
        return normalize(hidden_QLD[:, self._index].float() - self._mean_D, dim=-1)

    def rows(self, end: int) -> HeldRows:
        """Those before position `end`, a run's one after the other, in the order in which runs began."""
        columns = HeldColumns(*(column[: self._count] for column in self._columns))
        order_T = columns.run_T.argsort(stable=True)
        order_T = order_T[columns.pos_T[order_T] < end]
        if len(order_T) == self._count and bool((order_T.diff() > 0).all()):
            return HeldRows(columns, self.sources)
        ordered = HeldColumns(columns.state_TD, *(column[order_T] for column in columns[1:]))
        return HeldRows(ordered, self.sources, order_T)

    def _add(self, rows: JournalRows) -> None:
        count = self._count + len(rows)
        if count > len(self._columns.pos_T):
            grown = HeldColumns.empty(max(count, 2 * self._count, _FIRST_ROWS), len(self._mean_D))
            for new, old in zip(grown, self._columns, strict=True):
                new[: self._count] = old[: self._count]
            self._columns = grown
        part = slice(self._count, count)
        names = zip(rows.streams, rows.runs, strict=True)
        found = [self._source_of.setdefault(name, len(self._source_of)) for name in names]
        self.sources = list(self._source_of)
        self._columns.state_TD[part] = self.unit(rows.hidden_TLD).bfloat16()
        self._columns.token_T[part] = rows.token_T.int()
        self._columns.run_T[part] = torch.tensor(found, dtype=torch.int32)
        self._columns.seq_T[part] = rows.seq_T
        self._columns.pos_T[part] = rows.pos_T
        self._count, self._end = count, int(rows.pos_T[-1]) + 1


def chosen_layer(query: AttendQuery, fingerprint: Fingerprint) -> int:
    """The layer whose states are compared: the one asked for, or the bank's middle one, the lower of two.

    Raises:
        InvalidInput: the bank has no such layer, or nothing is given to choose by.
    """
    layers = fingerprint.layers
    if query.layer is not None and query.layer not in layers:
        raise InvalidInput(f"layer is {query.layer}; this bank has states of layers {', '.join(map(str, layers))}")
    lacks = {
        "states": "" if query.hidden_QLD is not None else "hidden states (queries)",
        "bm25": "" if query.tokens_Q is not None else "tokens",
        "fused": "" if query.hidden_QLD is not None or query.tokens_Q is not None else "hidden states or tokens",
    }.get(query.method)
    if lacks:
        raise InvalidInput(f"method is {query.method!r}, which chooses by {lacks}: give them, or method='even'")
    return sorted(layers)[(len(layers) - 1) // 2] if query.layer is None else query.layer


def fetched(cold: ColdStore, parts: Sequence[Entry], chosen: MemoryTokens) -> MemoryTokens:
    """Rows that were chosen, with the keys and values that their bank keeps; without, if any lack or are damaged.

    Args:
        cold: the store.
        parts: the bank, or its partitions.
        chosen: without keys and values.

    Raises:
        TooLarge: they don't fit into one answer.
    """
    found: dict[str, Any] = {}
    partition_N = torch.zeros_like(chosen.pos_N) if chosen.partition_N is None else chosen.partition_N
    for index, part in enumerate(parts):
        slot_N = torch.nonzero(partition_N == index)[:, 0]
        if not len(slot_N):
            continue
        try:
            rows = cold.attended(part).get(chosen.pos_N[slot_N], _ANSWER_BYTES // len(parts))
        except Corrupt as error:
            _log.warning("rows without keys and values", bank=part.name, reason=error.message)
            return chosen
        if rows is None or any(name in found and _unlike(found[name], rows[name]) for name in rows):
            return chosen
        for name, tensor in rows.items():
            if name not in found:
                found[name] = tensor.new_empty(tensor.shape[0], len(chosen), *tensor.shape[2:])
            found[name][:, slot_N] = tensor
    return replace(chosen, **{f"{name}_{_SHAPES[name]}": tensor for name, tensor in found.items()})


def _unlike(one: Tensor, other: Tensor) -> bool:
    return one.dtype != other.dtype or (one.shape[0], *one.shape[2:]) != (other.shape[0], *other.shape[2:])
