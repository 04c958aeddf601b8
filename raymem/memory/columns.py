"""One output column a token, for memories that add rows up: which column each row's token has, oldest token out first.

Unlike a table that is filled a chunk at a time, this one goes row by row: how rows are cut into calls changes nothing.

Shape legend: `B` banks, `T` rows, `U` columns.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor


class Seats(NamedTuple):
    """The table after a batch, and where its rows went.

    `token_BU` is -1 where free, `used_BU` the number of the row that wrote a column last; `slot_BT` each row's column,
    -1 where it was lost to a later row; `lost_BU` bool, columns whose old content is gone.
    """

    token_BU: Tensor
    used_BU: Tensor
    slot_BT: Tensor
    lost_BU: Tensor


def take_columns(token_BU: Tensor, used_BU: Tensor, tokens_BT: Tensor, length_B: Tensor, count_B: Tensor) -> Seats:
    """Seat rows one after another: a new token takes the first free column, or that of the token unseen for longest.

    Args:
        token_BU: int64 `[B, U]`, -1 where a column is free.
        used_BU: int64 `[B, U]`.
        tokens_BT: int64 `[B, T]`; a negative token gets no column.
        length_B: int64 `[B]` how many of the T rows are real.
        count_B: int64 `[B]` rows seen before.
    """
    columns = (token_BU, used_BU, tokens_BT, length_B, count_B)
    seated = [_take(*bank) for bank in zip(*(column.tolist() for column in columns), strict=True)]
    return Seats(*(torch.tensor(part, device=token_BU.device) for part in zip(*seated, strict=True)))


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
