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
from torch.nn.functional import normalize

from raymem.memory.base import ROWS_END, Dims, MergeRule, Options, State, StateSpec, TensorSpec
from raymem.memory.eviction import policy_part, policy_spec, survivors
from raymem.memory.key_reservoir import joined_scopes
from raymem.memory.merging import bank_by_bank, interleaved
from raymem.memory.policies import PolicyName, policy
from raymem.memory.slots import CountedSlotOptions, SlotMemory
from raymem.memory.state import Batch, put


class LemnOptions(CountedSlotOptions):
    """How many rows are kept, and the policy that picks them.

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


class Lemn(SlotMemory):
    """Slots of a key, the token that followed it and a vector if rows carry one, kept or evicted row by row.

    While a slot is free the newcomer takes it. Then the policy gives all rows and the newcomer a logit, and the entry
    of the largest is evicted; decisions of a learned agent are drawn in training alone. Merging is approximate: rows
    that were evicted before it can't come back, though the other bank's were worth less.
    """

    kind: ClassVar[str] = "lemn"
    merge_rule: ClassVar[MergeRule] = "approximate"
    options_type: ClassVar[type[Options]] = LemnOptions
    learns: ClassVar[tuple[str, ...]] = ("policy",)
    held_by: ClassVar[str] = "arrival"

    def __init__(self, dims: Dims, options: LemnOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes)
        self.lemn = options
        self.policy = policy(
            options.policy,
            self.key_dims,
            strength=options.strength,
            gamma=options.gamma,
            hidden=options.hidden,
        )
        self.size_slots()

    def slot_spec(self) -> StateSpec:
        """One slot: the row, its number (-1 where free), and what the policy keeps of it."""
        arrival = {"arrival": TensorSpec((), torch.int64, low=-1, high=ROWS_END)}
        return super().slot_spec() | arrival | policy_spec(self.policy)

    def write_batch(self, state: State, batch: Batch) -> State:
        """Take the rows in one by one, each making room for the next."""
        return self.write_each(state, batch, self.policy)

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
