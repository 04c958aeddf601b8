"""Which rows of a bank a model attends to: pieces of consecutive rows that match what came last.

Two measures, and their sum. Late interaction over the states of one layer (Khattab and Zaharia 2020, arXiv 2004.12832,
equation 3): each token of the question looks for its best match in a piece, here less that token's mean over all
pieces, so that a token that matches everywhere counts nothing. BM25 over token ids (Robertson and Zaragoza 2009,
equation 3.15), a piece being a document.

Shape legend: T held rows, P pieces, Q tokens of the question, U different ones, D width of states, N chosen rows.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from raymem.errors import InvalidInput
from raymem.types import ChoiceMethod

PIECE, SINKS = 32, 4
# BM25's saturation of repeated tokens and its correction for length
_K1, _B = 1.2, 0.75
# the share of the rows that is spread evenly beside the best pieces
_EVEN_SHARE = 0.0


class Held(NamedTuple):
    """What a bank still holds, in the order of its journal, a run's rows one after the other.

    `states_TD` are centred states of unit length of one layer (float; None where only tokens are known), `tokens_T`
    their ids, `run_T` which run each row is of (any numbers), `pos_T` journal positions; all of T rows, int64.
    """

    states_TD: Tensor | None
    tokens_T: Tensor
    run_T: Tensor
    pos_T: Tensor


class Choice(NamedTuple):
    """Rows to attend to: their places in `Held` and journal positions, both ascending, and the best match in [0, 1]."""

    place_N: Tensor
    pos_N: Tensor
    relevance: float


def choose(
    held: Held,
    query_states_QD: Tensor | None,
    query_tokens_Q: Tensor,
    rows: int,
    *,
    piece: int = PIECE,
    sinks: int = SINKS,
    method: ChoiceMethod = "fused",
) -> Choice:
    """Choose the rows that a model attends to while it goes on from a question.

    The first `sinks` rows are chosen always: a model leans on the first tokens of a text (Xiao et al. 2023,
    arXiv 2309.17453). Without a question, or where it matches nothing, rows are spread evenly.

    Args:
        held: of the bank.
        query_states_QD: centred, unit states of the last tokens, of `held`'s layer; None: tokens alone count.
        query_tokens_Q: ids of the same tokens, int64.
        rows: how many to choose; fewer come back only where fewer are held.
        piece: how many consecutive rows of one run are chosen together.
        sinks: how many of the first rows are chosen always.
        method: `fused` states and BM25, one of them, `even` or `recent`.

    Raises:
        InvalidInput: counts below 1 (`sinks` below 0), an unknown method, or states that don't fit the held ones.
    """
    _check(held, query_states_QD, (rows, piece, sinks), method)
    total = len(held.tokens_T)
    if method == "recent" or rows >= total:
        first = min(sinks, rows, total)
        place_N = torch.cat([torch.arange(first), torch.arange(max(first, total - rows + first), total)])
        return Choice(place_N, held.pos_T[place_N], 0.0)
    pieces = _Pieces.of(held.run_T, piece)
    scores_P, relevance = _scores(held, pieces, query_states_QD, query_tokens_Q, method)
    place_N = _fill(pieces, scores_P, rows, sinks)
    return Choice(place_N, held.pos_T[place_N], relevance)


class _Pieces(NamedTuple):
    """How rows are cut: each row's piece, and its slot where every piece has `size` of them."""

    piece_T: Tensor
    slot_T: Tensor
    pieces: int
    size: int

    @classmethod
    def of(cls, run_T: Tensor, size: int) -> _Pieces:
        places_T = torch.arange(len(run_T))
        starts_T = torch.ones(len(run_T), dtype=torch.bool)
        starts_T[1:] = run_T[1:] != run_T[:-1]
        within_T = places_T - torch.where(starts_T, places_T, 0).cummax(0).values
        piece_T = (within_T % size == 0).cumsum(0) - 1
        return cls(piece_T, piece_T * size + within_T % size, int(piece_T[-1]) + 1, size)

    def spread(self, found_QT: Tensor, empty: float) -> Tensor:
        """Columns `[Q, P, size]` of rows by their piece, with `empty` where a piece has no more rows."""
        spread_QS = found_QT.new_full((len(found_QT), self.pieces * self.size), empty)
        return spread_QS.index_copy_(1, self.slot_T, found_QT).reshape(len(found_QT), self.pieces, self.size)


def _scores(
    held: Held, pieces: _Pieces, states_QD: Tensor | None, tokens_Q: Tensor, method: ChoiceMethod
) -> tuple[Tensor | None, float]:
    """Scores `[P]` of the pieces, None where nothing matches, and the relevance of the best."""
    found: list[Tensor] = []
    relevance = 0.0
    if method in ("fused", "states") and states_QD is not None and held.states_TD is not None and len(states_QD):
        by_states_P, relevance = _late_interaction(held.states_TD, pieces, states_QD)
        found.append(by_states_P)
    if method in ("fused", "bm25") and len(tokens_Q):
        by_tokens_P, covered = _bm25(held.tokens_T, pieces, tokens_Q)
        found.append(by_tokens_P)
        relevance = max(relevance, covered)
    matching = [_standardised(scores_P) for scores_P in found if float(scores_P.std(correction=0)) > 0]
    return (torch.stack(matching).sum(0) if matching else None), relevance


def _late_interaction(states_TD: Tensor, pieces: _Pieces, states_QD: Tensor) -> tuple[Tensor, float]:
    cosines_QT = (states_QD.to(states_TD.dtype) @ states_TD.T).float()
    best_QP = pieces.spread(cosines_QT, -1.0).amax(-1)
    relevance = float(best_QP.amax(1).mean().clamp(0, 1))
    return (best_QP - best_QP.mean(1, keepdim=True)).mean(0), relevance


def _bm25(tokens_T: Tensor, pieces: _Pieces, tokens_Q: Tensor) -> tuple[Tensor, float]:
    asked_U, times_U = torch.unique(tokens_Q, return_counts=True)
    hits_UP = pieces.spread((tokens_T == asked_U[:, None]).float(), 0.0).sum(-1)
    length_P = torch.bincount(pieces.piece_T, minlength=pieces.pieces).float()
    having_U = (hits_UP > 0).sum(1)
    weight_U = torch.log1p((pieces.pieces - having_U + 0.5) / (having_U + 0.5))
    room_P = _K1 * (1 - _B + _B * length_P / length_P.mean())
    parts_UP = weight_U[:, None] * hits_UP * (_K1 + 1) / (hits_UP + room_P)
    covered = float((weight_U * times_U * (having_U > 0)).sum() / (weight_U * times_U).sum().clamp_min(1e-12))
    return (times_U[:, None] * parts_UP).sum(0), covered


def _standardised(scores_P: Tensor) -> Tensor:
    return (scores_P - scores_P.mean()) / scores_P.std(correction=0).clamp_min(1e-12)


def _fill(pieces: _Pieces, scores_P: Tensor | None, rows: int, sinks: int) -> Tensor:
    """Places `[N]` of the sinks, of rows from the best pieces on, and of a part spread evenly."""
    total = len(pieces.piece_T)
    rank_T = torch.full((total,), pieces.pieces)
    if scores_P is not None:
        rank_P = scores_P.argsort(descending=True, stable=True).argsort()
        rank_T = rank_P[pieces.piece_T]
    rank_T[:sinks] = -1
    matched = 0 if scores_P is None else rows - round(_EVEN_SHARE * (rows - sinks))
    order_T = rank_T.argsort(stable=True)
    chosen_N = order_T[: max(matched, min(sinks, rows))]
    left_R = order_T[len(chosen_N) :].sort().values
    spread = rows - len(chosen_N)
    even_N = left_R[torch.arange(spread) * len(left_R) // max(spread, 1)]
    return torch.cat([chosen_N, even_N]).sort().values


def _check(held: Held, states_QD: Tensor | None, counts: tuple[int, int, int], method: ChoiceMethod) -> None:
    rows, piece, sinks = counts
    if rows < 1 or piece < 1 or sinks < 0:
        raise InvalidInput(f"{rows} rows in pieces of {piece} with {sinks} sinks: give at least 1, 1 and 0")
    if method not in get_args(ChoiceMethod):
        raise InvalidInput(f"method is {method!r}; choose among {', '.join(get_args(ChoiceMethod))}")
    if states_QD is None or held.states_TD is None:
        return
    if states_QD.dim() != 2 or states_QD.shape[1] != held.states_TD.shape[1]:
        raise InvalidInput(
            f"states are {list(states_QD.shape)}; the bank's are {held.states_TD.shape[1]} wide: send [Q, width]"
        )
