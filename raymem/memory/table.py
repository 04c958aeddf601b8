"""A bounded table of the tokens seen, one slot each; when it is full the token not written for longest makes room.

Shape legend: `B` banks, `T` rows, `S` slots.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor


def seat(token_BS: Tensor, used_BS: Tensor, tokens_BT: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every token of a chunk a slot; no slot that the chunk itself uses is taken from it.

    Args:
        token_BS: int64 `[B, S]` the token in each slot, -1 where free.
        used_BS: int64 `[B, S]` when a slot was last written, in writes since the start.
        tokens_BT: int64 `[B, T]` tokens of a chunk, at most S different ones.
        length_B: int64 `[B]` how many of them are real.

    Returns:
        Tokens and uses after the chunk, and bool `[B, S]` where a slot got another token.
    """
    banks = zip(token_BS.tolist(), used_BS.tolist(), tokens_BT.tolist(), length_B.tolist(), strict=True)
    seated = [_seat_one(table, used, tokens[:length]) for table, used, tokens, length in banks]
    device = token_BS.device
    tokens_after, used_after, changed = (torch.tensor(part, device=device) for part in zip(*seated, strict=True))
    return tokens_after, used_after, changed


def _seat_one(table: list[int], used: list[int], tokens: list[int]) -> tuple[list[int], list[int], list[bool]]:
    by_age = OrderedDict((table[slot], slot) for slot in sorted(range(len(table)), key=used.__getitem__))
    by_age.pop(-1, None)
    assert len(set(tokens)) <= len(table), "a chunk has more different tokens than the table has slots"
    changed = [False] * len(table)
    clock = max(used)
    # known ones first: they must not lose their slot to a new one
    for token in tokens:
        if token in by_age:
            by_age.move_to_end(token)
    for token in tokens:
        if token not in by_age:
            slot = len(by_age) if len(by_age) < len(table) else by_age.popitem(last=False)[1]
            changed[slot] = table[slot] >= 0
            by_age[token] = slot
        by_age.move_to_end(token)
    for token in tokens:
        clock += 1
        table[by_age[token]], used[by_age[token]] = token, clock
    return table, used, changed
