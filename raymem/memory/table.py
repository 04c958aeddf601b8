"""A bounded table of the tokens seen, one slot each; when it is full the token not written for longest makes room.

Shape legend: `B` banks, `T` rows, `S` slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def seat(token_BS: Tensor, used_BS: Tensor, tokens_BT: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every token of a chunk a slot; no slot that the chunk itself uses is taken from it.

    Args:
        token_BS: int64 `[B, S]` the token in each slot, -1 where free.
        used_BS: int64 `[B, S]` when a slot was last written, in writes since the start; 0 where free.
        tokens_BT: int64 `[B, T]` tokens of a chunk, T at most S.
        length_B: int64 `[B]` how many of them are real.

    Returns:
        Tokens and uses after the chunk, and bool `[B, S]` where a slot lost its token to another.
    """
    slots, step_T = token_BS.shape[1], torch.arange(tokens_BT.shape[1], device=token_BS.device)
    assert len(step_T) <= slots, "a chunk may have more tokens than the table has slots"
    real_BT = step_T < length_B[:, None]
    match_BTS = (tokens_BT[..., None] == token_BS[:, None]) & real_BT[..., None]
    known_BT = match_BTS.any(-1)
    same_BTT = tokens_BT[..., None] == tokens_BT[:, None]
    first_BT = same_BTT.to(torch.int8).argmax(-1)
    # free slots first, then by age; the chunk's own come last
    busy_BS = used_BS.masked_fill(match_BTS.any(1), torch.iinfo(torch.int64).max)
    by_age_BS = busy_BS.argsort(dim=1, stable=True)
    new_BT = real_BT & ~known_BT & (first_BT == step_T)
    taken_BT = by_age_BS.gather(1, (new_BT.cumsum(1) - 1).clamp_min(0)).gather(1, first_BT)
    slot_BT = torch.where(known_BT, match_BTS.to(torch.int8).argmax(-1), taken_BT).masked_fill(~real_BT, slots)
    written_BT = used_BS.amax(1, keepdim=True) + 1 + step_T
    used_after = pad(used_BS, (0, 1)).scatter_reduce(1, slot_BT, written_BT, "amax")[:, :slots]
    token_after = pad(token_BS, (0, 1)).scatter(1, slot_BT, tokens_BT)[:, :slots]
    return token_after, used_after, (token_after != token_BS) & (token_BS >= 0)
