"""Merging the states of several banks: whose row was first, and bank by bank through arenas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raymem.errors import InvalidInput
from raymem.memory.base import State


def interleaved(number_N: Tensor, which: int, counts: Sequence[int]) -> Tensor:
    """Numbers that rows of one bank get in the one journal of all: rows are ordered by their age.

    Banks are merged as of now, so that their newest rows are equally new, whatever each has seen before. Of rows of
    one age the bank that comes first in `counts` has the earlier one. No clock is needed in the states for that.

    Args:
        number_N: int64 `[N]`, numbers of rows in bank `which`, from 0.
        which: the bank's index.
        counts: rows that each bank has seen.
    """
    after_N = counts[which] - 1 - number_N
    later_N = after_N.clone()
    for other, count in enumerate(counts):
        if other != which:
            later_N += (after_N + int(other > which)).clamp_max(count)
    return sum(counts) - 1 - later_N


def bank_by_bank(merge: Callable[[list[State]], State], states: Sequence[State]) -> State:
    """`merge` of each bank's own states, arenas of one, put together as an arena again."""
    check_states(states)
    banks = len(next(iter(states[0].values())))
    merged = [merge([{n: t[bank : bank + 1] for n, t in state.items()} for state in states]) for bank in range(banks)]
    return {name: torch.cat([state[name] for state in merged]) for name in states[0]}


def check_states(states: Sequence[State]) -> None:
    """Raise InvalidInput unless there are states, of one form."""
    if not states:
        raise InvalidInput("merge got no states; give it at least one")
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} for state in states]
    odd = [index for index, shape in enumerate(shapes) if shape != shapes[0]]
    if odd:
        raise InvalidInput(
            f"states {odd} and state 0 are of different forms; merge states of one spec and as many banks"
        )
