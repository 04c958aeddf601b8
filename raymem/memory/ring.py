"""Base of the slot memories as they serve a stream: each row takes the next slot, reads are by content.

NTM and DNC are networks that learn where to write. In front of a stream their interface is scripted, every write
weighting is one-hot, and what their equations then do to the slots is a ring: it is written here in one go.

Shape legend: `B` banks, `T` rows, `Q` queries, `N` slots, `K` key width, `V` value width, `k` candidates.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raymem.errors import InvalidSpec, InvalidTrace
from raymem.kernels.content_address import cosines
from raymem.memory.base import Dims, Options, Seed, State
from raymem.memory.eviction import EvictionOptions
from raymem.memory.quantize import STORED, KeyDtype, Projection, pack
from raymem.memory.slots import answered, put
from raymem.memory.spec import StateSpec, TensorSpec
from raymem.memory.state import Batch, StateMemory

_LEAST_SLOTS = 16
_TOKEN_MAX = torch.iinfo(torch.int32).max


class RingOptions(Options):
    """How many slots, what they hold, and how sharply they are read.

    `slots` at most, fewer where the budget is small; keys in `key_dtype`, of `key_dims` dimensions (None: their own
    width, else a projection drawn from `projection_seed`). `strength` is the beta of the content read.
    """

    slots: int = Field(default=4096, ge=1)
    strength: float = Field(default=16.0, gt=0)
    key_dtype: KeyDtype = "float32"
    key_dims: int | None = Field(default=None, ge=1)
    projection_seed: Seed = 0


class RingMemory(StateMemory):
    """Slots [N] of a key, the token that followed it and a vector if rows carry one; a full ring overwrites the oldest.

    A read weighs the slots by `softmax(beta cos)`. Candidates are the tokens of the slots with most weight, scores the
    logarithm of the weight; two slots may name the same token.
    """

    options_type: ClassVar[type[Options]] = RingOptions

    def __init__(self, dims: Dims, options: RingOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes, Projection(dims.key, options.key_dims, options.projection_seed))
        self.ring = options
        self.rule = options.rule(self.key_dims, options.strength) if isinstance(options, EvictionOptions) else None
        self.slots = self._affordable_slots()
        self.check_budget()

    def slot_spec(self) -> StateSpec:
        """Shapes and dtypes of one slot."""
        spec = {
            "key": TensorSpec((self.key_dims,), STORED[self.ring.key_dtype]),
            "token": TensorSpec((), torch.int32, low=-1),
        }
        return spec | ({"value": TensorSpec((self.dims.value,))} if self.dims.value else {})

    def own_spec(self) -> StateSpec:
        """All slots."""
        return {name: spec._replace(shape=(self.slots, *spec.shape)) for name, spec in self.slot_spec().items()}

    def start(self, banks: int) -> State:
        """Slots of zeros without a token."""
        own = {name: torch.zeros(banks, *spec.shape, dtype=spec.dtype) for name, spec in self.own_spec().items()}
        return own | {"token": own["token"] - 1}

    def write_batch(self, state: State, batch: Batch) -> State:
        """Row number n goes to slot n mod N.

        Raises:
            InvalidTrace: a token id that 32 bits can't hold, or rows without the vectors that this bank keeps.
        """
        bank_M, row_M, slot_M = self._places(state["count"], batch)
        key = batch.keys_BTK[bank_M, row_M]
        narrow = state["key"].dtype == torch.int8
        columns = {"key": pack(key, torch.int8)[0] if narrow else key, "token": self._tokens(batch)[bank_M, row_M]}
        if self.dims.value:
            if batch.values_BTV is None:
                raise InvalidTrace(f"rows carry no values; this bank keeps vectors of width {self.dims.value} each")
            columns["value"] = batch.values_BTV[bank_M, row_M]
        return {name: put(state[name], (bank_M, slot_M), column) for name, column in columns.items()}

    def answer(self, state: State, queries_BQK: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots weighed by content; see the class."""
        return answered(state, self.log_weights(state, queries_BQK), k)

    def log_weights(self, state: State, queries_BQK: Tensor) -> Tensor:
        """Logarithm `[B, Q, N]` of the read weighting, -inf where a slot holds nothing.

        Reference:
            NTM (1410.5401) equation 5; DNC's `C(M, k, beta)`.
        """
        free_B1N = (state["token"] < 0)[:, None]
        scores = self.ring.strength * cosines(state["key"].to(queries_BQK.dtype), queries_BQK)
        # finite where nothing is held, so that nothing turns into NaN
        masked = scores.masked_fill(free_B1N, torch.finfo(scores.dtype).min)
        return torch.log_softmax(masked, -1).masked_fill(free_B1N, float("-inf"))

    def _places(self, count_B: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Bank, row and slot of each row that is real and not overwritten within the batch."""
        step_T = torch.arange(batch.keys_BTK.shape[1], device=count_B.device)
        length_B1 = batch.length_B[:, None]
        bank_M, row_M = torch.nonzero((step_T < length_B1) & (step_T >= length_B1 - self.slots), as_tuple=True)
        return bank_M, row_M, (count_B[bank_M] + row_M) % self.slots

    def _affordable_slots(self) -> int:
        fixed = sum(spec.nbytes for spec in self.base_spec().values())
        each = sum(spec.nbytes for spec in self.slot_spec().values())
        slots, least = min(self.ring.slots, (self.budget_bytes - fixed) // each), min(_LEAST_SLOTS, self.ring.slots)
        if slots < least:
            raise InvalidSpec(
                f"budget_bytes={self.budget_bytes} leaves a {self.kind} bank {max(0, slots)} slots of {each} bytes; it "
                f"needs {least}, so {fixed + least * each} bytes, or a lower key_dims"
            )
        return slots

    @staticmethod
    def _tokens(batch: Batch) -> Tensor:
        if int(batch.tokens_BT.max()) > _TOKEN_MAX:
            raise InvalidTrace(f"token id {int(batch.tokens_BT.max())} is over {_TOKEN_MAX}, the largest a bank keeps")
        return batch.tokens_BT.to(torch.int32)
