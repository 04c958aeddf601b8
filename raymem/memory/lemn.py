"""Long-term Episodic Memory Network: slots, and an agent that decides which row makes room for the next.

Jung et al. 2018, "Learning What to Remember" (arXiv 1812.04227). The agents and the policies they are compared with are
in policies.py.

Shape legend: `B` banks, `T` rows, `N` slots, `E = N + 1` entries, `Q` queries, `K` key width, `k` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from raymem.errors import InvalidSpec
from raymem.kernels.content_address import cosines
from raymem.memory.base import Dims, MergeRule, Options, State
from raymem.memory.eviction import make_room, policy_part, policy_spec, survivors
from raymem.memory.key_reservoir import joined_scopes
from raymem.memory.merging import bank_by_bank, interleaved
from raymem.memory.policies import Entries, PolicyName, policy
from raymem.memory.quantize import Projection
from raymem.memory.slots import SlotOptions, answered, narrowed, put, row_spec, rows_of
from raymem.memory.spec import ROWS_END, StateSpec, TensorSpec
from raymem.memory.state import Batch, StateMemory

_LEAST_SLOTS = 16


class LemnOptions(SlotOptions):
    """How many rows there is room for, and who decides which.

    `slots` at most, fewer where the budget is small. `policy` is one of policies.py; `gamma` is that of `im` (None:
    learned), `hidden` the width of the agents `s` and `st`, which look at every slot for each row: for few slots.

    On a frozen model's states of five texts, 3,072 rows into 250 slots, the next token is among the best 8 candidates
    in 0.314 of cases with `fifo`, 0.313 with `lru`, 0.312 with `reservoir` and `uniform`, 0.296 with `lifo`, 0.287 with
    `im`. `lru`, the default, is as good as any and also keeps what a longer stream comes back to.
    """

    slots: int = Field(default=1024, ge=1)
    policy: PolicyName = "lru"
    gamma: float | None = Field(default=0.5, ge=0)
    hidden: int = Field(default=32, ge=1, le=4096)


class Lemn(StateMemory):
    """Slots of a key, the token that followed it and a vector if rows carry one, kept or evicted row by row.

    While a slot is free the newcomer takes it. Then the policy weighs all rows and the newcomer, and the largest logit
    goes; learned agents are drawn from in training and never here. A read weighs slots by `softmax(beta cos)`;
    candidates are the tokens of the slots with most weight, scores the logarithm of the weight.
    Merging is approximate: rows that were evicted before it can't come back, though the other bank's were worth less.
    """

    kind: ClassVar[str] = "lemn"
    merge_rule: ClassVar[MergeRule] = "approximate"
    options_type: ClassVar[type[Options]] = LemnOptions
    learns: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, dims: Dims, options: LemnOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes, Projection(dims.key, options.key_dims, options.projection_seed))
        self.lemn = options
        self.policy = policy(
            options.policy,
            self.key_dims,
            strength=options.strength,
            gamma=options.gamma,
            hidden=options.hidden,
        )
        self.slots = self._affordable_slots()
        self.check_budget()

    def slot_spec(self) -> StateSpec:
        """One slot: the row, its number (-1 where free), and what the policy keeps of it."""
        row = row_spec(self.dims, self.key_dims, self.lemn.key_dtype) | {
            "arrival": TensorSpec((), torch.int64, low=-1, high=ROWS_END)
        }
        return row | policy_spec(self.policy)

    def own_spec(self) -> StateSpec:
        """All slots."""
        return {name: spec._replace(shape=(self.slots, *spec.shape)) for name, spec in self.slot_spec().items()}

    def start(self, banks: int) -> State:
        """Free slots."""
        own = {name: torch.zeros(banks, *spec.shape, dtype=spec.dtype) for name, spec in self.own_spec().items()}
        return own | {"token": own["token"] - 1, "arrival": own["arrival"] - 1}

    def write_batch(self, state: State, batch: Batch) -> State:
        """Take the rows in one by one, each making room for the next.

        Reference:
            1812.04227 section 3: append the newcomer, delete one of the N + 1 entries.
        """
        rows = rows_of(batch, self.dims)
        rows["key"] = narrowed(rows["key"], state["key"].dtype)
        own = {name: state[name] for name in self.own_spec()}
        # unit length, and zeros where a slot is free: made once, and kept up with what is written
        unit_BNK = normalize(state["key"].detach().to(batch.keys_BTK.dtype), dim=-1)
        rounded_BTK = rows["key"].detach().to(state["key"].dtype).to(batch.keys_BTK.dtype)
        units_BTK = normalize(rounded_BTK, dim=-1)
        for t in range(batch.keys_BTK.shape[1]):
            number_B = state["count"] + t
            entries = Entries(unit_BNK, own["arrival"], units_BTK[:, t], number_B)
            row = {name: column[:, t] for name, column in rows.items()} | {"arrival": number_B}
            own, where = self._step(own, entries, row, t < batch.length_B)
            unit_BNK = unit_BNK.index_put_(where, units_BTK[where[0], t])
        return own

    def answer(self, state: State, queries_BQK: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots weighed by content; see the class."""
        return answered(state, self.log_weights(state, queries_BQK), k)

    def log_weights(self, state: State, queries_BQK: Tensor) -> Tensor:
        """Logarithm `[B, Q, N]` of the read weighting, -inf where a slot is free."""
        free_B1N = (state["arrival"] < 0)[:, None]
        scores = self.lemn.strength * cosines(state["key"].to(queries_BQK.dtype), queries_BQK)
        # finite where nothing is held, so that nothing turns into NaN
        masked = scores.masked_fill(free_B1N, torch.finfo(scores.dtype).min)
        return torch.log_softmax(masked, -1).masked_fill(free_B1N, float("-inf"))

    def merge(self, states: Sequence[State]) -> State:
        """Rows of all, numbered by age, of which the policy evicts until they fit, the newest being the newcomer."""
        return bank_by_bank(self._merged, states)

    def _merged(self, states: list[State]) -> State:
        rows = self._union(states)
        wide = torch.float64 if rows["key"].dtype == torch.float64 else torch.float32
        unit_MK = normalize(rows["key"].to(wide), dim=-1)
        left = survivors(self.policy, policy_part(rows), unit_MK, rows["arrival"], self.slots)
        rows = {name: column[left] for name, column in rows.items()}
        start = {name: tensor.to(states[0][name].dtype) for name, tensor in self.init_state(1).items()}
        where = (torch.zeros_like(rows["arrival"]), torch.arange(len(rows["arrival"])))
        own = {name: put(start[name], where, column) for name, column in rows.items()}
        return start | own | joined_scopes(states) | {"count": torch.stack([s["count"] for s in states]).sum(0)}

    def _union(self, states: list[State]) -> State:
        """The slots in use of all banks, oldest first, numbered as in one journal."""
        counts, parts = [int(state["count"]) for state in states], []
        for which, state in enumerate(states):
            held = torch.nonzero(state["arrival"][0] >= 0)[:, 0]
            part = {name: state[name][0, held] for name in self.own_spec()}
            for name in ("arrival", *(f"policy_{name}" for name in self.policy.numbers)):
                part[name] = interleaved(part[name], which, counts)
            parts.append(part)
        order = torch.cat([part["arrival"] for part in parts]).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    def _step(self, own: State, entries: Entries, row: State, real_B: Tensor) -> tuple[State, tuple[Tensor, Tensor]]:
        """Own tensors after one newcomer a bank, and the places `(bank, slot)` that newcomers took."""
        kept = policy_part(own)
        seen, where = make_room(self.policy, kept, entries, real_B)
        after = own | {f"policy_{name}": column for name, column in seen.items()}
        return after | {name: put(own[name], where, column[where[0]]) for name, column in row.items()}, where

    def _affordable_slots(self) -> int:
        fixed = sum(spec.nbytes for spec in self.base_spec().values())
        each = sum(spec.nbytes for spec in self.slot_spec().values())
        slots, least = min(self.lemn.slots, (self.budget_bytes - fixed) // each), min(_LEAST_SLOTS, self.lemn.slots)
        if slots < least:
            raise InvalidSpec(
                f"budget_bytes={self.budget_bytes} leaves a lemn bank {max(0, slots)} slots of {each} bytes; it needs "
                f"{least}, so {fixed + least * each} bytes, or a lower key_dims"
            )
        return slots
