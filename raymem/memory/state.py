"""Base of the kinds whose state is bounded: a record of tensors whose leading axis is the bank.

Shape legend: `B` banks, `T` rows, `Q` queries, `K` key width, `V` value width, `k` candidates.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from raymem.errors import InvalidSpec
from raymem.memory.base import (
    ROWS_END,
    Dims,
    EncodedRows,
    Found,
    Memory,
    Options,
    Projection,
    State,
    StateSpec,
    TensorSpec,
    check_state,
)
from raymem.memory.key_reservoir import SCOPE_ROWS, sample, similarity


class Batch(NamedTuple):
    """Rows of B banks, each bank's real rows first.

    `keys_BTK` unit, projected; `values_BTV` or None; `tokens_BT` int64; `length_B` int64 says how many are real.
    """

    keys_BTK: Tensor
    values_BTV: Tensor | None
    tokens_BT: Tensor
    length_B: Tensor


class Answer(NamedTuple):
    """What B banks answer to Q queries each; fields as in Found, with the bank in front."""

    values_BQV: Tensor
    similarity_BQ: Tensor
    tokens_BQk: Tensor
    scores_BQk: Tensor


class StateMemory(Memory):
    """A mechanism of bounded state; one arena holds many banks, and a bank alone is an arena of one.

    A kind says what its own tensors are (`own_spec`), what they hold at first (`start`), and how a batch changes them
    (`write_batch`) and answers (`answer`). The base projects keys, keeps the count of rows and the `scope` reservoir,
    checks budgets, and has the methods that the runtime calls. `write` is functional when gradients are on; otherwise a
    kind may reuse the storage it was given. Float tensors of the state may be float64 throughout: tests do that.
    """

    def __init__(self, dims: Dims, options: Options, budget_bytes: int, projection: Projection) -> None:
        super().__init__(dims, options, budget_bytes)
        self.project = projection
        self.key_dims = projection.dims
        # the reservoir may take a quarter of a small budget, not more
        self.scope_rows = min(SCOPE_ROWS, max(1, budget_bytes // 4 // (self.key_dims + 4)))

    @abstractmethod
    def own_spec(self) -> StateSpec:
        """Shapes and dtypes of the kind's own tensors, for one bank."""

    @abstractmethod
    def start(self, banks: int) -> State:
        """The kind's own tensors of `banks` empty banks."""

    @abstractmethod
    def write_batch(self, state: State, batch: Batch) -> State:
        """The kind's own tensors after the batch; `state["count"]` still counts the rows before it."""

    @abstractmethod
    def answer(self, state: State, queries_BQK: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Blended values [B, Q, V], tokens [B, Q, k] and scores [B, Q, k] of projected queries."""

    def base_spec(self) -> StateSpec:
        """Shapes and dtypes of the tensors that every bounded kind has, for one bank."""
        return {
            "count": TensorSpec((), torch.int64, low=0, high=ROWS_END),
            "scope_keys": TensorSpec((self.scope_rows, self.key_dims), torch.int8),
            "scope_scale": TensorSpec((self.scope_rows,), low=0),
        }

    def state_spec(self) -> StateSpec:
        """Shapes and dtypes of one bank's whole state."""
        return self.base_spec() | self.own_spec()

    def check_budget(self) -> None:
        """Raise InvalidSpec if the state of these options is larger than the budget."""
        needed = sum(spec.nbytes for spec in self.state_spec().values())
        if needed > self.budget_bytes:
            raise InvalidSpec(
                f"a {self.kind} bank of these options needs {needed} bytes and its budget_bytes is "
                f"{self.budget_bytes}; raise the budget, or lower key_dims"
            )

    def init_state(self, banks: int) -> State:
        """State of `banks` banks that have seen no rows."""
        base = {name: torch.zeros(banks, *spec.shape, dtype=spec.dtype) for name, spec in self.base_spec().items()}
        return base | self.start(banks)

    def write(
        self,
        state: State,
        keys_BTK: Tensor,
        values_BTV: Tensor | None,
        tokens_BT: Tensor,
        mask_BT: Tensor | None = None,
    ) -> State:
        """Write each bank's rows in order.

        Args:
            state: of B banks.
            keys_BTK: `[B, T, K]` unit keys; bfloat16 is widened.
            values_BTV: `[B, T, V]` where rows carry vectors, else None.
            tokens_BT: int64 `[B, T]`, the token that followed each row.
            mask_BT: bool `[B, T]`; a row that is False is not there. Default: all are.
        """
        if mask_BT is not None and not bool(mask_BT.any()):
            return state
        if keys_BTK.shape[1] == 0:
            return state
        batch = self._batch(state, keys_BTK, values_BTV, tokens_BT, mask_BT)
        own = self.write_batch(state, batch)
        scope_keys, scope_scale = sample(
            state["scope_keys"], state["scope_scale"], batch.keys_BTK, state["count"], batch.length_B
        )
        base = {"scope_keys": scope_keys, "scope_scale": scope_scale, "count": state["count"] + batch.length_B}
        return base | own

    def read(self, state: State, queries_BQK: Tensor, k: int) -> Answer:
        """Read without changing the state; a bank that has seen nothing answers zeros and no tokens.

        Args:
            state: of B banks.
            queries_BQK: `[B, Q, K]` unit queries; bfloat16 is widened.
            k: candidate tokens a query gets.
        """
        queries = self.project(queries_BQK).to(state["scope_scale"].dtype)
        values, tokens, scores = self.answer(state, queries, k)
        empty_B11 = (state["count"] == 0)[:, None, None]
        return Answer(
            values.masked_fill(empty_B11, 0.0),
            similarity(state["scope_keys"], state["scope_scale"], queries),
            tokens.masked_fill(empty_B11, -1),
            scores.masked_fill(empty_B11, float("-inf")),
        )

    def _batch(
        self, state: State, keys_BTK: Tensor, values_BTV: Tensor | None, tokens_BT: Tensor, mask_BT: Tensor | None
    ) -> Batch:
        dtype = state["scope_scale"].dtype
        keys = self.project(keys_BTK).to(dtype)
        values = None if values_BTV is None else values_BTV.to(dtype)
        if mask_BT is None:
            return Batch(keys, values, tokens_BT, torch.full_like(state["count"], keys.shape[1]))
        order = torch.argsort((~mask_BT).to(torch.int8), dim=1, stable=True)
        keys = keys.gather(1, order[..., None].expand_as(keys))
        values = None if values is None else values.gather(1, order[..., None].expand_as(values))
        return Batch(keys, values, tokens_BT.gather(1, order), mask_BT.sum(1))

    def empty(self) -> State:
        """State of an arena of one."""
        return self.init_state(1)

    def absorb(self, state: State, rows: EncodedRows) -> State:
        """Write one bank's rows."""
        values = None if rows.values_NV is None else rows.values_NV[None]
        return self.write(state, rows.keys_NK[None], values, rows.tokens_N[None])

    def lookup(self, state: State, queries_QK: Tensor, k: int) -> Found:
        """Read one bank."""
        return Found(*(part[0] for part in self.read(state, queries_QK[None], k)))

    def dump(self, state: State) -> State:
        """One bank's tensors, copied, without the bank axis."""
        return {name: tensor[0].detach().clone() for name, tensor in sorted(state.items())}

    def load(self, tensors: State) -> State:
        """The state that `dump` wrote; see Memory.load."""
        check_state(self.kind, tensors, self.state_spec())
        return {name: tensor[None].clone() for name, tensor in tensors.items()}

    def nbytes(self, state: State) -> int:
        """Bytes of the tensors held, one bank's share of the arena."""
        return sum(tensor[0].nbytes for tensor in state.values())


def put(column: Tensor, where: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """`column` `[B, N, ...]` with rows `[M, ...]` at the places `(bank, slot)`; in place when gradients are off."""
    rows = rows.to(column.dtype)
    return column.index_put(where, rows) if torch.is_grad_enabled() else column.index_put_(where, rows)
