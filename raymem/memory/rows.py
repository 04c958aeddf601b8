"""Base of the kinds that keep rows: growable columns of one bank, a ring once the budget is full.

Shape legend: `N` rows, `Q` queries, `K` key width, `k` candidates.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from raymem.errors import Corrupt, InvalidInput, InvalidSpec
from raymem.memory.base import (
    Dims,
    EncodedRows,
    Found,
    Memory,
    Options,
    Shown,
    State,
    StateSpec,
    TensorSpec,
    check_state,
)
from raymem.memory.eviction import make_room, policy_part, policy_spec, survivors
from raymem.memory.policies import Entries, Policy

_FIRST_ROWS = 256


@dataclass
class RowState:
    """One bank's rows.

    `columns` are buffers [allocated, ...] of which the first `count` rows are held; their order is that of the column
    `pos`. `head` is the slot that the next row takes.
    """

    columns: State
    count: int = 0
    head: int = 0

    def held(self) -> State:
        """Views of the rows held, valid until the next `absorb`."""
        return {name: column[: self.count] for name, column in self.columns.items()}


class RowMemory(Memory):
    """A mechanism that keeps rows, one bank at a time; nothing already held is copied per write.

    A kind says what a row's columns are (`columns_spec`), how rows fill them (`encode`), and how to read them
    (`lookup`). Capacity follows from the budget; at capacity the row that `rule` picks makes room, the oldest where
    that is None. The newest `newest` rows always stay, at most half of what there is room for.

    `row_spec` is one row's entry in each column, those of the policy among them.
    """

    keeps_rows: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    def __init__(
        self, dims: Dims, options: Options, budget_bytes: int, rule: Policy | None = None, newest: int = 0
    ) -> None:
        super().__init__(dims, options, budget_bytes)
        self.rule = rule
        self.row_spec = self.columns_spec() | ({} if rule is None else policy_spec(rule))
        row_bytes = sum(spec.nbytes for spec in self.row_spec.values())
        self.capacity = budget_bytes // row_bytes
        if self.capacity < 1:
            raise InvalidSpec(
                f"one row of a {self.kind} bank takes {row_bytes} bytes and its budget_bytes is {budget_bytes}; "
                "raise the budget, or lower key_dims"
            )
        self.newest = min(newest, self.capacity // 2)

    @abstractmethod
    def columns_spec(self) -> StateSpec:
        """Shape and dtype of one row's entry in each column; `pos`, `seq` and `source` are among them."""

    @abstractmethod
    def encode(self, rows: EncodedRows) -> State:
        """Rows as columns, the leading axis being the row."""

    @abstractmethod
    def units(self, columns: State) -> Tensor:
        """Unit keys `[N, K]` float32 of rows as `encode` made them."""

    @abstractmethod
    def lookup(self, state: RowState, queries_QK: Tensor, k: int, mask: Tensor | None = None) -> Found:
        """Read without changing the state.

        Args:
            state: of one bank.
            queries_QK: `[Q, K]` unit queries.
            k: neighbours a query gets.
            mask: bool `[N]` or `[Q, N]` over `state.held()`; a row that is False is hidden inside the search.
        """

    @staticmethod
    @abstractmethod
    def blend(options: Any, scores_Qk: Tensor, vectors_QkV: Tensor) -> Tensor:
        """The value `[Q, V]` float32 that the kind makes of neighbours' vectors; zeros where there is no neighbour.

        Args:
            options: of the kind.
            scores_Qk: the neighbours' scores, -inf where there is none.
            vectors_QkV: their vectors.
        """

    def absorb(self, state: RowState, rows: EncodedRows) -> RowState:
        """Add rows, each over another once the bank is full; changes and returns `state`."""
        if not len(rows):
            return state
        return self._append_ring(state, rows) if self.rule is None else self._append_each(state, rows, self.rule)

    def _append_ring(self, state: RowState, rows: EncodedRows) -> RowState:
        added = len(rows)
        skipped = max(0, added - self.capacity)
        columns = self.encode(_from(rows, skipped))
        self._grow(state, min(self.capacity, state.count + added))
        start = (state.head + skipped) % self.capacity
        for name, values in columns.items():
            # up to the ring's end, the rest from its beginning
            first, column = values[: self.capacity - start], state.columns[name]
            column[start : start + len(first)] = first
            column[: added - skipped - len(first)] = values[len(first) :]
        state.head = (state.head + added) % self.capacity
        state.count = min(self.capacity, state.count + added)
        return state

    @torch.no_grad()
    def _append_each(self, state: RowState, rows: EncodedRows, rule: Policy) -> RowState:
        """Rows one by one, each by the policy; keys are unpacked once a call, and only for a policy that reads them."""
        new = self.encode(rows)
        held, room = state.count, min(self.capacity, state.count + len(rows))
        self._grow(state, room)
        for name, spec in policy_spec(rule).items():
            new[name] = torch.zeros(len(rows), *spec.shape, dtype=spec.dtype)
            state.columns[name][held:room] = 0
        state.columns["pos"][held:room] = -1
        units_NK, new_NK = (self._looked_at(columns, rule) for columns in (state.columns, new))
        units_NK[held:room] = 0
        recent = deque(state.held()["pos"].argsort()[max(0, held - self.newest) :].tolist(), maxlen=self.newest)
        for t in range(len(rows)):
            entries = Entries(
                units_NK[None, : min(self.capacity, state.count + 1)],
                state.columns["pos"][None, : min(self.capacity, state.count + 1)],
                new_NK[t : t + 1],
                new["pos"][t : t + 1],
            )
            slot = self._seat(state, entries, rule, recent)
            if slot is not None:
                units_NK[slot] = new_NK[t]
                for name in self.columns_spec():
                    state.columns[name][slot] = new[name][t]
                state.count = max(state.count, slot + 1)
        state.head = state.count % self.capacity
        return state

    def _seat(self, state: RowState, entries: Entries, rule: Policy, recent: deque[int]) -> int | None:
        """The slot that a newcomer takes, None where it goes itself; the policy's columns are brought up to date."""
        slots = entries.arrival_BN.shape[1]
        kept = {name: column[None, :slots] for name, column in policy_part(state.columns).items()}
        stays_1E = torch.zeros(1, slots + 1, dtype=torch.bool)
        stays_1E[0, list(recent)] = True
        stays_1E[0, slots] = self.newest > 0
        after, (_, slot_1) = make_room(rule, kept, entries, torch.ones(1, dtype=torch.bool), stays_1E)
        for name, column in after.items():
            state.columns[f"policy_{name}"][:slots] = column[0]
        if not len(slot_1):
            return None
        slot = int(slot_1)
        recent.append(slot)
        return slot

    def _looked_at(self, columns: State, rule: Policy) -> Tensor:
        return self.units(columns) if rule.by_content else columns["pos"].new_zeros(len(columns["pos"]), 0).float()

    def shown(self, state: RowState, pos_N: Tensor) -> Shown:
        """The rows held; see Memory.shown."""
        held_N = state.held()["pos"].sort().values
        return Shown(held_N, held_N[:0])

    def forget(self, state: RowState, positions: Tensor) -> RowState:
        """The state without the rows at these journal positions, exactly; the others keep their order and values."""
        held = state.held()
        kept = torch.nonzero(~torch.isin(held["pos"], positions.to(held["pos"].device)))[:, 0]
        kept = kept[torch.argsort(held["pos"][kept])]
        return RowState({name: column[kept] for name, column in held.items()}, len(kept), len(kept) % self.capacity)

    def merge(self, states: Sequence[RowState]) -> RowState:
        """The set union of the rows; where they are too many the policy evicts one after another.

        Two rows are one where their position, source and seq are equal: states of banks with positions of their own
        are `renumbered` first. A read of the union gives the best of all the states' answers.

        Raises:
            InvalidInput: no states.
        """
        if not states:
            raise InvalidInput("merge got no states; give it at least one")
        held = [state.held() for state in states]
        columns = {name: torch.cat([part[name] for part in held]) for name in held[0]}
        identity_NI = torch.stack([columns[name].long() for name in ("pos", "source", "seq")], 1)
        unique, inverse_N = torch.unique(identity_NI, dim=0, return_inverse=True)
        first = torch.full((len(unique),), len(inverse_N)).scatter_reduce(
            0, inverse_N, torch.arange(len(inverse_N)), "amin"
        )
        union = {name: column[first] for name, column in columns.items()}
        kept = torch.arange(len(first))[-self.capacity :]
        if self.rule is not None:
            units_MK = self._looked_at(union, self.rule)
            kept = survivors(self.rule, policy_part(union), units_MK, union["pos"], self.capacity, self.newest)
        return RowState({name: column[kept] for name, column in union.items()}, len(kept), len(kept) % self.capacity)

    def renumbered(self, state: RowState, first: int, sources_S: Tensor) -> RowState:
        """A copy whose positions start from `first` and whose source s is `sources_S[s]`, before it is merged."""
        held = {name: column.clone() for name, column in state.held().items()}
        held["pos"] += first
        held["source"] = sources_S[held["source"].long()].to(held["source"].dtype)
        return RowState(held, state.count, state.head)

    def state_spec(self) -> StateSpec:
        """Shapes and dtypes of a dumped state; -1 is the number of rows."""
        columns = {name: spec._replace(shape=(-1, *spec.shape)) for name, spec in self.row_spec.items()}
        return columns | {"head": TensorSpec((), torch.int64)}

    def empty(self) -> RowState:
        """A bank without rows."""
        return RowState({name: torch.empty(0, *spec.shape, dtype=spec.dtype) for name, spec in self.row_spec.items()})

    def dump(self, state: RowState) -> State:
        """The rows held, copied, and the slot that the next one takes."""
        held = {name: column.detach().clone() for name, column in sorted(state.held().items())}
        return held | {"head": torch.tensor(state.head)}

    def load(self, tensors: State) -> RowState:
        """The state that `dump` wrote; see Memory.load."""
        # checking every key would take as long as reading it
        check_state(self.kind, tensors, self.state_spec(), deep=False)
        columns = {name: tensor for name, tensor in tensors.items() if name != "head"}
        lengths = {len(column) for column in columns.values()}
        head, count = int(tensors["head"]), max(lengths)
        # below capacity the next slot follows the last row; a full ring may stand anywhere
        sound = len(lengths) == 1 and count <= self.capacity
        if not sound or not (head == count or (count == self.capacity and 0 <= head < count)):
            raise Corrupt(
                f"a {self.kind} bank with columns of {sorted(lengths)} rows, next slot {head} and room for "
                f"{self.capacity} does not fit together; it was made with another budget or damaged"
            )
        return RowState({name: self._with_room(column) for name, column in columns.items()}, count, head)

    def nbytes(self, state: RowState) -> int:
        """Bytes allocated."""
        return sum(column.nbytes for column in state.columns.values())

    def _with_room(self, column: Tensor) -> Tensor:
        # with room to grow, so that the first write after a move does not copy the bank
        rows = len(column)
        room = min(self.capacity, rows + max(_FIRST_ROWS, rows // 8))
        behind = column.untyped_storage().nbytes() // column.element_size() - column.numel()
        if behind >= (room - rows) * math.prod(column.shape[1:]) and behind and column.is_contiguous():
            return column.as_strided((room, *column.shape[1:]), column.stride())
        return _longer(column, room)

    def _grow(self, state: RowState, rows: int) -> None:
        allocated = len(state.columns["pos"])
        if rows <= allocated:
            return
        size = min(self.capacity, max(rows, 2 * allocated, _FIRST_ROWS))
        for name, old in state.columns.items():
            # one column at a time, so that growing never holds two whole banks
            state.columns[name] = _longer(old[: state.count], size)


def _longer(column: Tensor, rows: int) -> Tensor:
    """A copy of a column with room for `rows`."""
    shape = (rows, *column.shape[1:])
    if column.device.type == "cpu":
        # torch allocates small pages, whose first use costs ten times what copying does; numpy allocates large ones
        new = torch.from_numpy(np.empty(math.prod(shape) * column.element_size(), np.uint8))
        new = new.view(column.dtype).reshape(shape)
    else:
        new = column.new_empty(shape)
    new[: len(column)] = column
    return new


def _from(rows: EncodedRows, start: int) -> EncodedRows:
    values = None if rows.values_NV is None else rows.values_NV[start:]
    origin = (rows.pos_N[start:], rows.seq_N[start:], rows.source_N[start:])
    return EncodedRows(rows.keys_NK[start:], rows.tokens_N[start:], values, *origin)
