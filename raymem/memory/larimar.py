"""Larimar: a memory matrix fitted by least squares, from which any one row can be taken out again exactly.

Das et al. 2024, "Larimar: Large Language Models with Episodic Memory Control" (arXiv 2403.11901), after the Kanerva
machine. Kept in information form, `C = sum w^T w` and `B = sum w^T z`; reading solves `M = (C + lambda I)^-1 B`.

Shape legend: `B` banks, `T` rows, `Q` queries, `K` key width, `S` memory rows, `V` value width, `U` token columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import isqrt
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from raymem.errors import Corrupt, InvalidInput, InvalidSpec, InvalidTrace, Unsupported
from raymem.kernels.rls_update import information_update, leverage, ridge_factor, to_grid
from raymem.memory.base import (
    ROWS_END,
    Dims,
    EncodedRows,
    MergeRule,
    Options,
    Projection,
    Seed,
    State,
    StateSpec,
    TensorSpec,
)
from raymem.memory.key_reservoir import joined_scopes
from raymem.memory.merging import check_states
from raymem.memory.quantize import pack
from raymem.memory.reference import Addressing, Reference
from raymem.memory.state import Batch, StateMemory

_LEAST_ROWS, _LEAST_TOKENS = 8, 16
_BLOCK_ROWS = 256
# the finest grid on which float32 sums of weights stay exact for tens of thousands of rows of one token
_FLOAT32_BITS = 12
# a ridge so small that only written keys lie within the sums, and how far rounding moves a leverage of 1
_TRACE_RIDGE = 1e-6
_SLACK = 1e-3
# how many rows the prior of a token's mean, which is zero, is worth
_PRIOR_ROWS = 0.3
# the share of a sphere of the rows' own size in the tokens' covariance
_ROUND = 0.3


class LarimarOptions(Options):
    """The memory's size, how keys address it, and what it puts out.

    `memory_rows` is the paper's K, about as many rows as can be told apart. `addressing` by "least_squares", which has
    no use for more rows than the key is wide, or by a "gaussian_filter" of width `filter_width`, nearly the nearest
    reference row. `ridge` is the prior's strength lambda. Without vector values a row's value is one-hot over `tokens`
    tokens, the one unseen for longest making room; the sums then say of each token how many rows it followed, where
    these lie and how far they scatter, and scores are the logarithms of the tokens' probabilities at the query.
    `cross_dtype` float32 halves a token's column; vectors stay float64. A small budget gives fewer rows and tokens
    than asked for.
    """

    memory_rows: int = Field(default=512, ge=1)
    addressing: Addressing = "least_squares"
    filter_width: float = Field(default=1e-3, gt=0)
    ridge: float = Field(default=1.0, gt=0)
    tokens: int = Field(default=1024, ge=_LEAST_TOKENS)
    cross_dtype: Literal["float64", "float32"] = "float64"
    key_dims: int | None = Field(default=None, ge=1)
    projection_seed: Seed = 0
    seed: Seed = 0


class Larimar(StateMemory):
    """Writing adds a row to two sums, forgetting takes it out, merging adds the sums of several banks: all exact.

    Keys address a reference memory that never changes, so that a row can be found again to be forgotten; sequential and
    batch writes are one and the same. Nothing is forgotten by itself. Merging is exact: the state is sums over rows.

    Reference:
        Larimar (2403.11901) equations 3 and 4; the ridge prior is the Kanerva machine's `U_0 = (sigma^2 / lambda) I`.
    """

    kind: ClassVar[str] = "larimar"
    merge_rule: ClassVar[MergeRule] = "exact"
    options_type: ClassVar[type[Options]] = LarimarOptions
    forgets: ClassVar[bool] = True

    def __init__(self, dims: Dims, options: LarimarOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes, Projection(dims.key, options.key_dims, options.projection_seed))
        self.larimar = options
        self.narrow = options.cross_dtype == "float32" and not dims.value
        self.memory_rows, self.width = self._affordable()
        self.check_budget()
        self.address = Reference(
            self.memory_rows, self.key_dims, options.seed, options.addressing, options.filter_width
        )
        if self.narrow:
            self.address.grid_bits = _FLOAT32_BITS

    def own_spec(self) -> StateSpec:
        """The two sums, each column's sum of squares, and which token a column stands for."""
        rows, wide = self.memory_rows, torch.float64
        spec = {
            "gram": TensorSpec((rows, rows), wide),
            "cross": TensorSpec((rows, self.width), torch.float32 if self.narrow else wide),
            "energy": TensorSpec((self.width,), wide, low=0),
        }
        token = TensorSpec((self.width,), torch.int64, low=-1, high=2**31 - 1)
        used = token._replace(low=0, high=ROWS_END)
        return spec if self.dims.value else spec | {"slot_token": token, "slot_used": used}

    def load(self, tensors: State) -> State:
        """As StateMemory.load; a sum of squares is symmetric, and with the ridge positive definite."""
        state, gram = super().load(tensors), tensors["gram"]
        ridged = gram + self.larimar.ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if not torch.equal(gram, gram.mT) or bool(torch.linalg.cholesky_ex(ridged)[1]):
            raise Corrupt("tensor 'gram' of a larimar bank is no sum of squares; the state is damaged")
        return state

    def start(self, banks: int) -> State:
        """Sums over no rows."""
        own = {name: torch.zeros(banks, *spec.shape, dtype=spec.dtype) for name, spec in self.own_spec().items()}
        if "slot_token" in own:
            own["slot_token"] -= 1
        return own

    def write_batch(self, state: State, batch: Batch) -> State:
        """`C += w^T w`, `B += w^T z`; a token without a column left adds to C alone."""
        own = {name: state[name] for name in self.own_spec()}
        slots = None
        if not self.dims.value:
            columns = take_columns(own["slot_token"], own["slot_used"], batch.tokens_BT, batch.length_B, state["count"])
            own |= {"slot_token": columns.token_BU, "slot_used": columns.used_BU}
            if bool(columns.lost_BU.any()):
                own["cross"] = own["cross"].masked_fill(columns.lost_BU[:, None], 0.0)
                own["energy"] = own["energy"].masked_fill(columns.lost_BU, 0.0)
            slots = columns.slot_BT
        real_BT = torch.arange(batch.keys_BTK.shape[1], device=batch.length_B.device) < batch.length_B[:, None]
        for start in range(0, batch.keys_BTK.shape[1], _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            weights = self.address(batch.keys_BTK[:, part]) * real_BT[:, part, None]
            own |= self._add(own, weights, self._values(batch, slots, part) * real_BT[:, part, None])
        return own

    def answer(self, state: State, queries_BQK: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """`z = w M`; of one-hot values, the tokens to whose rows the query most likely belongs."""
        weights = self.address(queries_BQK)
        if self.dims.value:
            z_BQV = self.readout(state, weights).to(queries_BQK.dtype)
            tokens = torch.full((*z_BQV.shape[:2], k), -1, device=z_BQV.device)
            return z_BQV, tokens, torch.full_like(tokens, float("-inf"), dtype=z_BQV.dtype)
        free_B1U = (state["slot_token"] < 0)[:, None]
        likely = log_posterior(state["gram"], state["cross"], state["energy"], weights)
        # finite where there is no token at all, so that nothing turns into NaN
        scores = torch.log_softmax(likely.masked_fill(free_B1U, torch.finfo(likely.dtype).min), -1)
        scores = scores.to(queries_BQK.dtype).masked_fill(free_B1U, float("-inf"))
        best, slot = scores.sort(dim=-1, descending=True, stable=True)
        tokens = state["slot_token"][:, None].expand_as(slot).gather(-1, slot)[..., :k]
        spare = (0, k - tokens.shape[-1])
        return queries_BQK[..., :0], pad(tokens, spare, value=-1), pad(best[..., :k], spare, value=float("-inf"))

    def readout(self, state: State, weights_BQS: Tensor) -> Tensor:
        """`w M` `[B, Q, V]` float64 of address weights; standard normal weights generate from the memory.

        Reference:
            Larimar (2403.11901) section 3, `Z_read = W M`.
        """
        solved_BSQ = torch.cholesky_solve(weights_BQS.mT, ridge_factor(state["gram"], self.larimar.ridge))
        return solved_BSQ.mT @ state["cross"].double()

    def matrix(self, state: State) -> Tensor:
        """The memory M `[B, S, V]` float64."""
        return torch.cholesky_solve(state["cross"].double(), ridge_factor(state["gram"], self.larimar.ridge))

    def forget(self, state: State, rows: EncodedRows) -> State:
        """The state without these rows of one bank, as if they had never been written; `state` is left as it is.

        Keys that the scope reservoir holds go too. The count of rows seen stays.

        Raises:
            InvalidInput: rows that can't have been written as they stand; nothing is forgotten then.
        """
        keys = self.project(rows.keys_NK[None])
        own = {name: state[name].clone() for name in self.own_spec()}
        lengths = torch.tensor([len(rows)], device=keys.device)
        batch = Batch(keys, None if rows.values_NV is None else rows.values_NV[None], rows.tokens_N[None], lengths)
        slots = None if self.dims.value else self._find(own, rows.tokens_N)
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            weights, values = self.address(keys[:, part]), self._values(batch, slots, part)
            self._check_written(own, weights, values, start)
            own |= self._add(own, weights, values, sign=-1.0)
        if not self.dims.value:
            own["slot_token"] = own["slot_token"].masked_fill(own["energy"] == 0, -1)
        return state | own | self._out_of_scope(state, keys)

    def merge(self, states: Sequence[State]) -> State:
        """Exactly the state that has seen the rows of all these, arenas of equal length; in any order.

        Raises:
            Unsupported: the banks' tokens together need more columns than one bank has.
        """
        check_states(states)
        total = {name: torch.stack([state[name] for state in states]).sum(0) for name in ("gram", "count")}
        return total | self._merged_columns(states, total["count"]) | joined_scopes(states)

    def _affordable(self) -> tuple[int, int]:
        """Memory rows and columns that the budget pays for: a quarter of it for the rows among themselves."""
        options = self.larimar
        left = self.budget_bytes - sum(spec.nbytes for spec in self.base_spec().values())
        most = min(options.memory_rows, self.key_dims) if options.addressing == "least_squares" else options.memory_rows
        if self.dims.value:
            # the larger root of 8 S^2 + 8 S V + 8 V = left
            paid = (isqrt(max(0, self.dims.value**2 + 4 * (left // 8 - self.dims.value))) - self.dims.value) // 2
            rows, columns, least = min(most, paid), self.dims.value, 0
        else:
            rows, least = min(most, isqrt(max(0, left) // 32)), _LEAST_TOKENS
            columns = min(options.tokens, (left - 8 * rows * rows) // ((4 if self.narrow else 8) * rows + 24))
        if rows < min(_LEAST_ROWS, most) or columns < least:
            raise InvalidSpec(
                f"budget_bytes={self.budget_bytes} leaves a larimar bank of key width {self.key_dims} {rows} memory "
                f"rows and {columns} columns; it needs {min(_LEAST_ROWS, most)} and {least or columns}: raise the "
                "budget or lower key_dims"
            )
        return rows, columns

    def _values(self, batch: Batch, slots_BT: Tensor | None, part: slice) -> Tensor:
        if slots_BT is not None:
            columns = torch.arange(self.width, device=slots_BT.device)
            return (slots_BT[:, part, None] == columns).double()
        if batch.values_BTV is None:
            raise InvalidTrace(f"rows carry no values; this bank keeps vectors of width {self.dims.value}")
        return to_grid(batch.values_BTV[:, part].double())

    @staticmethod
    def _add(own: State, weights_BTS: Tensor, values_BTV: Tensor, sign: float = 1.0) -> State:
        gram, cross = information_update(own["gram"], own["cross"], weights_BTS, values_BTV, sign)
        return {"gram": gram, "cross": cross, "energy": own["energy"] + sign * values_BTV.square().sum(1)}

    @staticmethod
    def _find(own: State, tokens_N: Tensor) -> Tensor:
        match_NU = tokens_N[:, None] == own["slot_token"]
        unknown = torch.nonzero(~match_NU.any(1) | (tokens_N < 0))
        if len(unknown):
            row = int(unknown[0])
            raise InvalidInput(
                f"row {row} followed by token {int(tokens_N[row])} is not in this bank: the token has no column. "
                "Forget only rows that were written; nothing was forgotten"
            )
        return match_NU.long().argmax(1)[None]

    @staticmethod
    def _check_written(own: State, weights_BTS: Tensor, values_BTV: Tensor, start: int) -> None:
        """Refuse rows whose removal would leave sums that no rows can have; see kernels/rls_update."""
        factor = ridge_factor(own["gram"], _TRACE_RIDGE)
        cross = own["cross"].double()
        explained = (cross * torch.cholesky_solve(cross, factor)).sum((1, 2))
        energy = own["energy"].sum(1)
        left = (energy - explained).clamp_min(0) + _TRACE_RIDGE * energy + torch.finfo(torch.float64).tiny
        share_BTT = leverage(factor, cross, weights_BTS, values_BTV, left)
        worst = share_BTT.diagonal(dim1=1, dim2=2).amax(0)
        bad = torch.nonzero(worst > 1 + _SLACK)
        whole = torch.linalg.eigvalsh(share_BTT).amax()
        if len(bad) or float(whole) > 1 + _SLACK:
            which = (
                f"row {start + int(bad[0])}" if len(bad) else f"rows {start} to {start + worst.shape[0] - 1} together"
            )
            raise InvalidInput(
                f"{which} can't have been written to this bank (leverage {max(float(worst.amax()), float(whole)):.3g}, "
                "at most 1 for written rows): forgetting would corrupt the memory. Send the rows exactly as they were "
                "written; nothing was forgotten"
            )

    @staticmethod
    def _out_of_scope(state: State, keys_1NK: Tensor) -> State:
        packed_NK, _ = pack(keys_1NK[0].detach(), state["scope_keys"].dtype)
        gone_R = torch.stack([(state["scope_keys"][0] == key).all(-1) for key in packed_NK]).any(0)
        return {
            "scope_keys": state["scope_keys"].masked_fill(gone_R[None, :, None], 0),
            "scope_scale": state["scope_scale"].masked_fill(gone_R[None], 0.0),
        }

    def _merged_columns(self, states: Sequence[State], count_B: Tensor) -> State:
        if self.dims.value:
            return {name: torch.stack([state[name] for state in states]).sum(0) for name in ("cross", "energy")}
        merged = self.start(len(count_B))
        del merged["gram"]
        for bank, count in enumerate(count_B.tolist()):
            tokens = torch.cat([state["slot_token"][bank] for state in states])
            known = torch.unique(tokens[tokens >= 0])
            if len(known) > self.width:
                raise Unsupported(
                    f"the banks hold {len(known)} different tokens together and one has columns for {self.width}; "
                    "merge into banks with a larger `tokens`"
                )
            merged["slot_token"][bank, : len(known)] = known
            for state in states:
                self._fold(merged, state, bank, count)
        return merged

    @staticmethod
    def _fold(merged: State, state: State, bank: int, count: int) -> None:
        held = torch.nonzero(state["slot_token"][bank] >= 0)[:, 0]
        known = merged["slot_token"][bank]
        where = torch.searchsorted(known[known >= 0], state["slot_token"][bank, held])
        for name in ("cross", "energy"):
            merged[name][bank].index_add_(-1, where, state[name][bank][..., held])
        # a column keeps its age; the younger of two counts
        used = state["slot_used"][bank, held] + count - int(state["count"][bank])
        merged["slot_used"][bank, where] = torch.maximum(merged["slot_used"][bank, where], used)


class Columns(NamedTuple):
    """The table of tokens after a batch, and the columns of the batch's rows.

    `token_BU` is -1 where free, `used_BU` the number of the row that wrote a column last; `slot_BT` each row's column,
    -1 where it was lost to a later row; `lost_BU` bool, columns whose old content is gone.
    """

    token_BU: Tensor
    used_BU: Tensor
    slot_BT: Tensor
    lost_BU: Tensor


def take_columns(token_BU: Tensor, used_BU: Tensor, tokens_BT: Tensor, length_B: Tensor, count_B: Tensor) -> Columns:
    """Columns of rows, one row after another, so that the cuts between calls change nothing.

    A new token takes the first free column, or that of the token unseen for longest.

    Args:
        token_BU: int64 `[B, U]`, -1 where a column is free.
        used_BU: int64 `[B, U]`.
        tokens_BT: int64 `[B, T]`; a negative token gets no column.
        length_B: int64 `[B]` how many of the T rows are real.
        count_B: int64 `[B]` rows seen before.
    """
    given = (token_BU, used_BU, tokens_BT, length_B, count_B)
    taken = [_take(*bank) for bank in zip(*(tensor.tolist() for tensor in given), strict=True)]
    return Columns(*(torch.tensor(part, device=token_BU.device) for part in zip(*taken, strict=True)))


def _take(
    table: list[int], used: list[int], tokens: list[int], length: int, count: int
) -> tuple[list[int], list[int], list[int], list[bool]]:
    held = sorted((slot for slot, token in enumerate(table) if token >= 0), key=used.__getitem__)
    by_age = OrderedDict((table[slot], slot) for slot in held)
    free = [slot for slot, token in reversed(list(enumerate(table))) if token < 0]
    since, lost = [0] * len(table), [False] * len(table)
    for row, token in enumerate(tokens[:length]):
        if token < 0:
            continue
        if token in by_age:
            by_age.move_to_end(token)
        else:
            slot = free.pop() if free else by_age.popitem(last=False)[1]
            lost[slot], since[slot] = table[slot] >= 0, row
            by_age[token] = slot
            table[slot] = token
        used[by_age[token]] = count + row
    slots = [by_age.get(token, -1) for token in tokens]
    valid = [row < length and slot >= 0 and row >= since[slot] for row, slot in enumerate(slots)]
    return table, used, [slot if good else -1 for slot, good in zip(slots, valid, strict=True)], lost


def log_posterior(gram_BSS: Tensor, cross_BSU: Tensor, rows_BU: Tensor, points_BQS: Tensor) -> Tensor:
    """Logarithms `[B, Q, U]` of each token's probability at the points, up to a constant a query.

    Each token's rows are a class, a Gaussian whose covariance all classes share.

    A class of n rows that sum to b has the mean b / (n + kappa), known as well as n + kappa rows allow; the covariance
    is that of rows about their own class's mean, and part of a sphere that makes it positive definite. So
    `log n - |q - m|^2 / 2v - S/2 log v`, the distance in that covariance and `v = 1 + 1 / (n + kappa)`. A class without
    rows has a finite logarithm that means nothing.

    Args:
        gram_BSS: float64, the sum of `w^T w` over all rows, those of no class among them.
        cross_BSU: the sum of each class's rows.
        rows_BU: how many rows each class has.
        points_BQS: float64.

    Reference:
        Fisher 1936, linear discriminants; Ledoit and Wolf 2004 for the sphere; the predictive distribution of a
        Gaussian of known covariance whose mean has a conjugate prior.
    """
    cross, rows = cross_BSU.double(), rows_BU.double().clamp_min(1)
    # rows are unit, so that the trace of their sum of squares counts them
    total_B11 = gram_BSS.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    within_BSS = gram_BSS - (cross / rows[:, None]) @ cross.mT
    unit_SS = torch.eye(gram_BSS.shape[-1], dtype=gram_BSS.dtype, device=gram_BSS.device)
    # a bank that has seen nothing has no scatter either
    sphere_B11 = (_ROUND / len(unit_SS) * total_B11).clamp_min(torch.finfo(total_B11.dtype).eps)
    factor_BSS = torch.linalg.cholesky(within_BSS + sphere_B11 * unit_SS)
    known_BU = rows + _PRIOR_ROWS
    means_BSU = _whitened(factor_BSS, cross / known_BU[:, None])
    asked_BSQ = _whitened(factor_BSS, points_BQS.mT)
    square_BQU = asked_BSQ.square().sum(1)[..., None] + means_BSU.square().sum(1)[:, None]
    distance_BQU = (square_BQU - 2 * asked_BSQ.mT @ means_BSU).clamp_min(0) * total_B11
    spread_B1U = (1 + 1 / known_BU)[:, None]
    volume_B1U = gram_BSS.shape[-1] * spread_B1U.log()
    log_posterior_BQU: Tensor = rows.log()[:, None] - (distance_BQU / spread_B1U + volume_B1U) / 2
    return log_posterior_BQU


def _whitened(factor_BSS: Tensor, columns_BSN: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(factor_BSS, columns_BSN, upper=False)
    return solved
