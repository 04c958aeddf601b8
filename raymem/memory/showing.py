"""What a kind of memory shows of the rows that it holds: for a question, or always the same.

Shape legend: T held rows, Q tokens of a question, D width of states, N chosen rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raymem.memory.base import Shown, class_of
from raymem.memory.choice import PIECE, SINKS, Choice, Held, choose
from raymem.memory.compress import spread_places
from raymem.types import ChoiceMethod

# a match of a kind with links is followed by so many rows before others match
_FOLLOWED = 7


class Asked(NamedTuple):
    """How many rows are wanted, and the question: centred unit states and ids of its tokens."""

    rows: int
    states_QD: Tensor | None
    tokens_Q: Tensor
    method: ChoiceMethod = "fused"


def choose_shown(held: Held, asked: Asked, kind: str, shown: Shown | None = None) -> Choice:
    """The rows of a bank that a model attends to, in the manner of the bank's kind.

    `spalm` and `lemn` show the best pieces of 32 rows; `ntm` the slots that match best, eight neighbours at a time;
    `dnc` single ones, each with the rows that its links lead on to. `compressive` and `dct` show the same rows whatever
    the question: fine ones and every c-th older one, all of them thinned alike where they are more than is wanted. The
    methods `even` and `recent` are the same for all kinds, and none shows anything of a bank that the question has
    nothing to do with.

    Args:
        held: the rows that the bank still has.
        asked: what is wanted.
        kind: of the bank.
        shown: what the bank said of them (`Memory.shown`); None: nothing of coarse rows and links.

    Raises:
        InvalidInput: as `choose` says.
    """
    states_QD, tokens_Q, piece = asked.states_QD, asked.tokens_Q, class_of(kind).piece
    # relevance is told by whole pieces, whatever is shown of them
    whole = choose(held, states_QD, tokens_Q, asked.rows, method=asked.method)
    if asked.method in ("even", "recent") or piece == PIECE or not len(whole.place_N):
        return whole
    if not piece:
        place_N = _always(held, asked.rows, shown)
    elif shown is None or shown.next_N is None:
        place_N = choose(held, states_QD, tokens_Q, asked.rows, piece=piece, method=asked.method, floor=0.0).place_N
    else:
        rows = min(asked.rows, SINKS + max(1, (asked.rows - SINKS) // (1 + _FOLLOWED)))
        matches = choose(held, states_QD, tokens_Q, rows, piece=piece, method=asked.method, floor=0.0)
        place_N = _followed(matches.place_N, _links(held, shown.fine_N, shown.next_N), asked.rows)
    return Choice(place_N, held.pos_T[place_N], whole.relevance)


def _always(held: Held, rows: int, shown: Shown | None) -> Tensor:
    """Places of sinks, fine rows and every c-th coarse one, or of all alike where that is too much."""
    stays_T = torch.ones(len(held.pos_T), dtype=torch.bool)
    if shown is not None and len(shown.coarse_M):
        coarse_M, ratio = shown.coarse_M.cpu(), shown.ratio
        thinned = coarse_M[torch.arange(len(coarse_M)) % ratio != ratio - 1]
        stays_T = ~torch.isin(held.pos_T, thinned)
        stays_T[:SINKS] = True
    if int(stays_T.sum()) <= rows:
        return torch.nonzero(stays_T)[:, 0]
    return spread_places(len(held.pos_T), rows, SINKS)


def _links(held: Held, fine_N: Tensor, next_N: Tensor) -> Tensor:
    """For each held row the place of the one that its link leads to, -1 where there is none."""
    order_T = held.pos_T.argsort()
    fine_N, next_N = fine_N.cpu(), next_N.cpu()
    at_N = torch.searchsorted(held.pos_T[order_T], fine_N).clamp(max=max(0, len(order_T) - 1))
    place_N = order_T[at_N].where(held.pos_T[order_T[at_N]] == fine_N, -1)
    there_N = (place_N >= 0) & (next_N >= 0)
    links_T = torch.full_like(held.pos_T, -1)
    links_T[place_N[there_N]] = place_N[next_N[there_N]]
    return links_T


def _followed(place_N: Tensor, links_T: Tensor, rows: int) -> Tensor:
    """Places, ascending: those given, what links lead on to, and rows spread evenly where that is too little."""
    taken_T = torch.zeros(len(links_T), dtype=torch.bool)
    taken_T[place_N] = True
    # sinks are there for attention to lean on, and match nothing
    ahead_N, left = place_N[place_N >= SINKS], rows - len(place_N)
    while left > 0 and len(ahead_N):
        ahead_N = torch.unique(links_T[ahead_N])
        new_N = ahead_N[ahead_N >= 0]
        ahead_N = new_N = new_N[~taken_T[new_N]][:left]
        taken_T[new_N] = True
        left -= len(new_N)
    rest_N = torch.nonzero(~taken_T)[:, 0]
    taken_T[rest_N[spread_places(len(rest_N), max(0, left), 0)]] = True
    return torch.nonzero(taken_T)[:, 0]
