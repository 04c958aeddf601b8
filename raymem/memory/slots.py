"""Slots that hold rows: what a row is made of, and the memories that read slots by content.

Shape legend: `B` banks, `T` rows, `M` rows put, `N` slots, `Q` queries, `k` candidates, `K` key width, `V` value width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, pad

from raymem.errors import InvalidSpec, InvalidTrace
from raymem.kernels.content_address import cosines
from raymem.memory.base import Dims, Options, Projection, Seed, Shown, State, StateSpec, TensorSpec, positions_of
from raymem.memory.eviction import Places, make_room, policy_part
from raymem.memory.policies import Entries, Policy
from raymem.memory.quantize import STORED, KeyDtype, pack
from raymem.memory.state import Batch, StateMemory, put

_LEAST_SLOTS = 16
# tensors that are -1 where a slot is free
_FREE = ("token", "arrival")
_TOKEN_MAX = torch.iinfo(torch.int32).max


class SlotOptions(Options):
    """How rows are kept and how sharply they are read.

    Keys are kept in `key_dtype`, of `key_dims` dimensions (None: their own width, else a projection drawn from
    `projection_seed`). `strength` is the beta of the content read.
    """

    strength: float = Field(default=16.0, gt=0)
    key_dtype: KeyDtype = "float32"
    key_dims: int | None = Field(default=None, ge=1)
    projection_seed: Seed = 0


class CountedSlotOptions(SlotOptions):
    """As SlotOptions, and at most `slots` rows, fewer where the budget is small."""

    slots: int = Field(default=4096, ge=1)


class SlotMemory(StateMemory):
    """Slots [N] of a key, the token that followed it and a vector if rows carry one; reads are by content.

    A read weighs the slots by `softmax(beta cos)`. Candidates are the tokens of the slots with most weight, scores the
    logarithm of the weight; two slots may name the same token. `held_by` names the tensor that is negative where a slot
    is free. `slots` is what the options ask for, or what the budget pays for.
    """

    options_type: ClassVar[type[Options]] = CountedSlotOptions
    held_by: ClassVar[str] = "token"

    def __init__(self, dims: Dims, options: CountedSlotOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes, Projection(dims.key, options.key_dims, options.projection_seed))
        self.asked = options

    def size_slots(self) -> None:
        """Set `slots`, once `slot_spec` can be called.

        Raises:
            InvalidSpec: the budget pays for fewer than 16, naming the bytes needed.
        """
        fixed = sum(spec.nbytes for spec in self.base_spec().values())
        each = sum(spec.nbytes for spec in self.slot_spec().values())
        asked = self.asked.slots
        self.slots, least = min(asked, (self.budget_bytes - fixed) // each), min(_LEAST_SLOTS, asked)
        if self.slots < least:
            raise InvalidSpec(
                f"budget_bytes={self.budget_bytes} leaves a {self.kind} bank {max(0, self.slots)} slots of {each} "
                f"bytes; it needs {least}, so {fixed + least * each} bytes, or a lower key_dims"
            )
        self.check_budget()

    def slot_spec(self) -> StateSpec:
        """Shapes and dtypes of one slot."""
        return row_spec(self.dims, self.key_dims, self.asked.key_dtype)

    def own_spec(self) -> StateSpec:
        """All slots."""
        return {name: spec._replace(shape=(self.slots, *spec.shape)) for name, spec in self.slot_spec().items()}

    def start(self, banks: int) -> State:
        """Free slots: zeros, and -1 in the tensors that mark a free slot so."""
        own = {name: torch.zeros(banks, *spec.shape, dtype=spec.dtype) for name, spec in self.own_spec().items()}
        return own | {name: own[name] - 1 for name in _FREE if name in own}

    def answer(self, state: State, queries_BQK: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots weighed by content; see the class."""
        log_BQN = self.log_weights(state, queries_BQK)
        best, slot = log_BQN.topk(min(k, log_BQN.shape[-1]), dim=-1)
        token_BQN = state["token"].long()[:, None].expand_as(log_BQN)
        spare = (0, k - best.shape[-1])
        blended = log_BQN.exp() @ state["value"] if "value" in state else log_BQN[..., :0]
        return blended, pad(token_BQN.gather(-1, slot), spare, value=-1), pad(best, spare, value=float("-inf"))

    def shown(self, state: State, pos_N: Tensor) -> Shown:
        """The rows whose slots are in use; see Memory.shown."""
        number_N = self.numbers(state)[0]
        held_N = positions_of(number_N[number_N >= 0].sort().values, int(state["count"]), pos_N)
        return Shown(held_N, held_N[:0])

    def numbers(self, state: State) -> Tensor:
        """Number `[B, N]` of the row in each slot, counted from 0 since the bank's first; negative in free slots."""
        return state["arrival"]

    def log_weights(self, state: State, queries_BQK: Tensor) -> Tensor:
        """Logarithm `[B, Q, N]` of the read weighting, -inf where a slot is free.

        Reference:
            NTM (1410.5401) equation 5; DNC's `C(M, k, beta)`.
        """
        free_B1N = (state[self.held_by] < 0)[:, None]
        scores = self.asked.strength * cosines(state["key"].to(queries_BQK.dtype), queries_BQK)
        # finite where nothing is held, so that nothing turns into NaN
        masked = scores.masked_fill(free_B1N, torch.finfo(scores.dtype).min)
        return torch.log_softmax(masked, -1).masked_fill(free_B1N, float("-inf"))

    def write_each(self, state: State, batch: Batch, rule: Policy) -> State:
        """Rows one by one, each in a free slot or in that of the entry that the policy evicts.

        Reference:
            1812.04227 section 3: append the newcomer, delete one of the N + 1 entries.
        """
        rows = rows_of(batch, self.dims)
        rows["key"] = narrowed(rows["key"], state["key"].dtype)
        own = {name: state[name] for name in self.own_spec()}
        # unit length, and zeros where a slot is free: computed once, and updated with each row
        unit_BNK = normalize(state["key"].detach().to(batch.keys_BTK.dtype), dim=-1)
        rounded_BTK = rows["key"].detach().to(state["key"].dtype).to(batch.keys_BTK.dtype)
        units_BTK = normalize(rounded_BTK, dim=-1)
        for t in range(batch.keys_BTK.shape[1]):
            number_B = state["count"] + t
            entries = Entries(unit_BNK, own["arrival"], units_BTK[:, t], number_B)
            seen, where = make_room(rule, policy_part(own), entries, t < batch.length_B)
            row = {name: column[where[0], t] for name, column in rows.items()} | {"arrival": number_B[where[0]]}
            own |= {f"policy_{name}": column for name, column in seen.items()}
            own |= {name: put(own[name], where, column) for name, column in row.items()} | self.linked(own, where)
            unit_BNK = unit_BNK.index_put_(where, units_BTK[where[0], t])
        return own

    def linked(self, own: State, where: Places) -> State:
        """Those of a kind's own tensors that say how slots are linked, after rows were put at these places."""
        return {}


class RingMemory(SlotMemory):
    """Row number n goes to slot n mod N: a full ring overwrites the oldest.

    NTM and DNC are networks that learn where to write. For a stream their interface is scripted, every write weighting
    is one-hot, and their equations write a ring of slots, which is computed here directly.
    """

    def write_batch(self, state: State, batch: Batch) -> State:
        """Put the rows into their slots.

        Raises:
            InvalidTrace: a token id that 32 bits can't hold, or rows without the vectors that this bank keeps.
        """
        bank_M, row_M, slot_M = self.places(state["count"], batch)
        columns = {name: column[bank_M, row_M] for name, column in rows_of(batch, self.dims).items()}
        columns["key"] = narrowed(columns["key"], state["key"].dtype)
        return {name: put(state[name], (bank_M, slot_M), column) for name, column in columns.items()}

    def numbers(self, state: State) -> Tensor:
        """See SlotMemory: the ring says which row each slot has."""
        last_B1 = state["count"][:, None] - 1
        return last_B1 - (last_B1 - torch.arange(self.slots, device=last_B1.device)) % self.slots

    def places(self, count_B: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Bank, row and slot of each row that is real and not overwritten within the batch."""
        step_T = torch.arange(batch.keys_BTK.shape[1], device=count_B.device)
        length_B1 = batch.length_B[:, None]
        bank_M, row_M = torch.nonzero((step_T < length_B1) & (step_T >= length_B1 - self.slots), as_tuple=True)
        return bank_M, row_M, (count_B[bank_M] + row_M) % self.slots


def row_spec(dims: Dims, key_dims: int, key_dtype: KeyDtype, tokens: int | None = None) -> StateSpec:
    """Shapes and dtypes of one row: its key, its next token (or `tokens` of them), its vector if rows carry one."""
    token = TensorSpec(() if tokens is None else (tokens,), torch.int32, low=-1)
    spec = {"key": TensorSpec((key_dims,), STORED[key_dtype]), "token": token}
    return spec | ({"value": TensorSpec((dims.value,))} if dims.value else {})


def rows_of(batch: Batch, dims: Dims) -> State:
    """A batch as rows `[B, T, ...]`, keys still in full.

    Raises:
        InvalidTrace: a token id that 32 bits can't hold, or rows without the vectors that this bank keeps.
    """
    if int(batch.tokens_BT.max()) > _TOKEN_MAX:
        raise InvalidTrace(f"token id {int(batch.tokens_BT.max())} is over {_TOKEN_MAX}, the largest a bank keeps")
    rows = {"key": batch.keys_BTK, "token": batch.tokens_BT.to(torch.int32)}
    if not dims.value:
        return rows
    if batch.values_BTV is None:
        raise InvalidTrace(f"rows carry no values; this bank keeps vectors of width {dims.value} each")
    return rows | {"value": batch.values_BTV}


def narrowed(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys `[..., K]` as they are kept; only 8 bits change their type, so that a float64 state stays one."""
    return pack(keys, torch.int8)[0] if dtype == torch.int8 else keys


def widened(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Kept keys `[..., K]` in full; those of 8 bits are of unit length again."""
    return normalize(keys.to(dtype), dim=-1) if keys.dtype == torch.int8 else keys.to(dtype)
