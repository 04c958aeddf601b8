"""A seeded reservoir of the keys that a bank has seen: a memory without rows measures a query's similarity by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymem.memory.base import State
from raymem.memory.quantize import pack, unpack

SCOPE_ROWS = 256
_HASHES = 2**40
_SEED = 0x5C09E
_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def hash62(counter: Tensor) -> Tensor:
    """Splitmix64 of int64 counters, as 62 non-negative bits."""
    x = (counter + _SEED) * _GOLDEN
    # arithmetic shifts keep the sign: mask it away, as a logical shift would
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) & 0x3FFFFFFFFFFFFFFF


def sample(
    kept_BRK: Tensor, scale_BR: Tensor, keys_BTK: Tensor, count_B: Tensor, length_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Reservoir sampling (Vitter's algorithm R): row n of a bank takes the slot that a hash of n gives it, or none.

    Args:
        kept_BRK: int8 `[B, R, K]`, the reservoir before, with `scale_BR`.
        scale_BR: float `[B, R]`, 0 where a slot is free.
        keys_BTK: `[B, T, K]` new keys.
        count_B: int64 `[B]` rows seen before.
        length_B: int64 `[B]` how many of the T rows are real; they come first.

    Returns:
        The reservoir after the rows, new tensors. It depends on the rows and their numbers, not on the calls' borders.
    """
    banks, slots = scale_BR.shape
    step_T = torch.arange(keys_BTK.shape[1], device=keys_BTK.device)
    number_BT = count_B[:, None] + step_T
    drawn_BT = torch.where(number_BT < slots, number_BT, hash62(number_BT) % (number_BT + 1))
    lost_BT = (drawn_BT >= slots) | (step_T >= length_B[:, None])
    # of several rows for one slot the last one stays
    last_BR = torch.full((banks, slots + 1), -1, device=keys_BTK.device).scatter_reduce(
        1, drawn_BT.masked_fill(lost_BT, slots), step_T.expand(banks, -1), "amax"
    )[:, :slots]
    chosen_BRK = keys_BTK.detach().gather(1, last_BR.clamp_min(0)[..., None].expand(-1, -1, keys_BTK.shape[2]))
    packed_BRK, packed_BR = pack(chosen_BRK, kept_BRK.dtype)
    taken_BR = last_BR >= 0
    return (
        torch.where(taken_BR[..., None], packed_BRK, kept_BRK),
        torch.where(taken_BR, packed_BR.to(scale_BR.dtype), scale_BR),
    )


def similarity(kept_BRK: Tensor, scale_BR: Tensor, queries_BQK: Tensor) -> Tensor:
    """Highest cosine `[B, Q]` of each query with the reservoir; -1 where it is empty."""
    keys_BRK = unpack(kept_BRK, scale_BR).to(queries_BQK.dtype)
    scores_BQR = (queries_BQK @ keys_BRK.mT).masked_fill((scale_BR == 0)[:, None], -1.0)
    return scores_BQR.amax(-1).clamp(-1, 1)


def joined_scopes(states: Sequence[State]) -> State:
    """One reservoir of several: all keys while they fit, else those whose own hash is smallest, whatever the order."""
    keys_BRK = torch.cat([state["scope_keys"] for state in states], 1)
    scale_BR = torch.cat([state["scope_scale"] for state in states], 1)
    places = torch.arange(1, keys_BRK.shape[2] + 1, device=keys_BRK.device)
    mixed_BR = (hash62(keys_BRK.long() * places) % _HASHES).sum(-1) % _HASHES
    order_BR = mixed_BR.masked_fill(scale_BR == 0, _HASHES).argsort(dim=1, stable=True)
    order_BR = order_BR[:, : states[0]["scope_scale"].shape[1]]
    return {
        "scope_keys": keys_BRK.gather(1, order_BR[..., None].expand(-1, -1, keys_BRK.shape[2])),
        "scope_scale": scale_BR.gather(1, order_BR),
    }
