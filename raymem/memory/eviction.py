"""Eviction: how a memory of slots carries out what a policy decides.

Shape legend: `B` banks, `N` slots, `E = N + 1` entries (the newcomer last), `M` rows of one bank, `K` key width.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from raymem.memory.base import Options, State, StateSpec
from raymem.memory.policies import Entries, Policy, PolicyName, policy
from raymem.memory.state import put

Places = tuple[Tensor, Tensor]


class EvictionOptions(Options):
    """Which row a full memory evicts: `eviction` is one of policies.py, "fifo" the oldest row.

    `gamma` is that of "im" (None: learned), `hidden` the width of the agents "s" and "st".
    """

    eviction: PolicyName = "fifo"
    gamma: float | None = Field(default=0.5, ge=0)
    hidden: int = Field(default=32, ge=1, le=4096)

    def rule(self, key_dims: int, strength: float) -> Policy:
        """The policy for keys of `key_dims`; a memory does "fifo" without one, faster."""
        return policy(self.eviction, key_dims, strength=strength, gamma=self.gamma, hidden=self.hidden)


def make_room(
    rule: Policy, kept: State, entries: Entries, real_B: Tensor, stays_BE: Tensor | None = None
) -> tuple[State, Places]:
    """One newcomer a bank takes the first free slot, or that of the entry which the policy evicts.

    Args:
        rule: the policy.
        kept: its tensors `[B, N, ...]`; their storage is reused when gradients are off.
        entries: the memory and the newcomers.
        real_B: bool `[B]`, False where a bank has no newcomer: no slot is taken and the policy's tensors stay.
        stays_BE: bool `[B, E]`, entries that may not be evicted.

    Returns:
        The policy's tensors after it, and the places `(bank, slot)` that newcomers took; none where a newcomer itself
        was evicted.
    """
    logits_BE, seen = rule(kept, entries)
    if stays_BE is not None:
        logits_BE = logits_BE.masked_fill(stays_BE, float("-inf"))
    free_BN = entries.arrival_BN < 0
    goes_B = torch.where(free_BN.any(1), free_BN.to(torch.int8).argmax(1), logits_BE.argmax(1))
    bank = torch.nonzero(real_B & (goes_B < free_BN.shape[1]))[:, 0]
    where = (bank, goes_B[bank])
    after = {}
    for name, column in seen.items():
        noticed = torch.where(real_B.reshape(-1, *[1] * (column.dim() - 1)), column[:, :-1], kept[name])
        after[name] = put(noticed.to(kept[name].dtype), where, column[bank, -1])
    return after, where


def survivors(rule: Policy, kept: State, keys_MK: Tensor, number_M: Tensor, room: int, newest: int = 0) -> Tensor:
    """Indices of the rows that stay where one bank has too many: the policy evicts one after another.

    The newest row that is left counts as the newcomer each time.

    Args:
        rule: the policy.
        kept: its tensors `[M, ...]`.
        keys_MK: unit keys, oldest first.
        number_M: int64, ascending.
        room: how many stay.
        newest: how many of the newest may not be evicted.
    """
    left = torch.arange(len(number_M), device=number_M.device)
    while len(left) > room:
        old, new = left[:-1], left[-1:]
        entries = Entries(keys_MK[None, old], number_M[None, old], keys_MK[new], number_M[new])
        logits_1E, _ = rule({name: column[None, old] for name, column in kept.items()}, entries)
        goes = int(logits_1E[0, : len(left) - newest].argmax())
        left = torch.cat([left[:goes], left[goes + 1 :]])
    return left


def policy_spec(rule: Policy) -> StateSpec:
    """One slot's entry in each of the policy's tensors, under the names that they have in a memory's state."""
    return {f"policy_{name}": spec for name, spec in rule.spec().items()}


def policy_part(columns: State) -> State:
    """Those of a memory's tensors that are its policy's, under the policy's own names."""
    return {name.removeprefix("policy_"): column for name, column in columns.items() if name.startswith("policy_")}
