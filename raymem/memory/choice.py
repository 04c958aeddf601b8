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
# relevance under which states match a bank no better than another text's: of windows that went on from a bank's text
# 1 % had less than 0.70, of windows of another genre 95 % had (SmolLM2-135M, layer 26; at layer 15 the own have 0.77)
FLOOR = 0.7
# rows of a bank that say how well its text matches itself, and the pieces that a bank must have for that
_SAMPLE, _LEAST_PIECES = 64, 4
# numbers that are compared at a time, of a few bytes each
_BLOCK = 2**25


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
    """Rows to attend to: their places in `Held` and journal positions, both ascending, and the relevance in [0, 1]."""

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
    floor: float = FLOOR,
) -> Choice:
    """Choose the rows that a model attends to while it goes on from a question.

    The first `sinks` rows are chosen always: a model leans on the first tokens of a text (Xiao et al. 2023,
    arXiv 2309.17453). Without a question, or where it matches nothing, rows are spread evenly.

    Relevance by states is how well the question matches the bank, as a share of how well the bank's own rows match its
    other pieces; by tokens alone, the share of the question's weight in BM25 that the bank has. A bank of under four
    pieces, and one that is searched by tokens, is attended however low that is.

    Args:
        held: of the bank.
        query_states_QD: centred, unit states of the last tokens, of `held`'s layer; None: tokens alone count.
        query_tokens_Q: ids of the same tokens, int64.
        rows: how many to choose; fewer come back only where fewer are held.
        piece: how many consecutive rows of one run are chosen together.
        sinks: how many of the first rows are chosen always.
        method: `fused` states and BM25, one of them, `even` or `recent`.
        floor: with a lower relevance by states nothing is chosen.

    Raises:
        InvalidInput: counts below 1 (`sinks` below 0), an unknown method, or states that don't fit the held ones.
    """
    _check(held, query_states_QD, (rows, piece, sinks), method)
    total = len(held.tokens_T)
    if not total:
        return Choice(held.pos_T, held.pos_T, 0.0)
    pieces = _Pieces.of(held.run_T, piece)
    scores_P, relevance = None, 0.0
    if method in ("fused", "bm25") and len(query_tokens_Q):
        by_tokens_P, relevance = _bm25(held.tokens_T, pieces, query_tokens_Q)
        scores_P = _summed(scores_P, by_tokens_P)
    states_TD = held.states_TD
    if method in ("fused", "states") and states_TD is not None and query_states_QD is not None and len(query_states_QD):
        by_states_P, matched = _late_interaction(states_TD, pieces, query_states_QD, sinks)
        scores_P = _summed(scores_P, by_states_P)
        relevance = _relevance(states_TD, pieces, matched, sinks)
        if relevance < floor and pieces.pieces >= _LEAST_PIECES:
            none_N = held.pos_T[:0]
            return Choice(none_N, none_N, relevance)
    if method == "recent" or rows >= total:
        first = min(sinks, rows, total)
        place_N = torch.cat([torch.arange(first), torch.arange(max(first, total - rows + first), total)])
    else:
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


def _summed(scores_P: Tensor | None, more_P: Tensor) -> Tensor | None:
    """Scores and others, in units of their spread over the pieces; those that are all the same say nothing."""
    spread = float(more_P.std(correction=0))
    if spread == 0:
        return scores_P
    standard_P = (more_P - more_P.mean()) / spread
    return standard_P if scores_P is None else scores_P + standard_P


def _late_interaction(states_TD: Tensor, pieces: _Pieces, query_states_QD: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    """Each piece's score [P], and how well the question matches the rows behind the sinks, on average []."""
    scores_P, best = torch.zeros(pieces.pieces), list[Tensor]()
    for block_QD in torch.split(query_states_QD.to(states_TD.dtype), max(1, _BLOCK // len(states_TD))):
        cosines_QT = (block_QD @ states_TD.T).float()
        best_QP = pieces.spread(cosines_QT, -1.0).amax(-1)
        scores_P += (best_QP - best_QP.mean(1, keepdim=True)).sum(0)
        best.append(cosines_QT[:, _behind(sinks, len(states_TD)) :].amax(1))
    return scores_P / len(query_states_QD), torch.cat(best).mean()


def _behind(sinks: int, total: int) -> int:
    """The first row that relevance looks at: the states of first tokens are like each other, whatever the text."""
    return sinks if total > sinks else 0


def _relevance(states_TD: Tensor, pieces: _Pieces, matched: Tensor, sinks: int) -> float:
    """How well a question matches, as a share of how well a sample of the bank's own rows does in other pieces."""
    total = len(states_TD)
    sinks = _behind(sinks, total)
    if pieces.pieces < _LEAST_PIECES:
        return float(matched.clamp(0, 1))
    sample_S = torch.arange(sinks, total, max(1, (total - sinks) // _SAMPLE))[:_SAMPLE]
    best = list[Tensor]()
    for part_S in torch.split(sample_S, max(1, _BLOCK // total)):
        own_ST = (states_TD[part_S] @ states_TD.T).float()
        # what stands beside a row is like it in any text
        near_ST = (pieces.piece_T[part_S, None] - pieces.piece_T).abs() <= 1
        best.append(own_ST.masked_fill_(near_ST, -1.0)[:, sinks:].amax(1))
    own = torch.cat(best).mean()
    return float((matched / own.clamp_min(1e-6)).clamp(0, 1)) if float(own) > 0 else float(matched.clamp(0, 1))


def _bm25(tokens_T: Tensor, pieces: _Pieces, tokens_Q: Tensor) -> tuple[Tensor, float]:
    asked_U, times_U = torch.unique(tokens_Q, return_counts=True)
    length_P = torch.bincount(pieces.piece_T, minlength=pieces.pieces).float()
    room_P = _K1 * (1 - _B + _B * length_P / length_P.mean())
    scores_P, total, covered = torch.zeros(pieces.pieces), 0.0, 0.0
    size = max(1, _BLOCK // len(tokens_T))
    for part_U, often_U in zip(torch.split(asked_U, size), torch.split(times_U, size), strict=True):
        hits_UP = pieces.spread((tokens_T == part_U[:, None]).float(), 0.0).sum(-1)
        having_U = (hits_UP > 0).sum(1)
        weight_U = often_U * torch.log1p((pieces.pieces - having_U + 0.5) / (having_U + 0.5))
        scores_P += (weight_U[:, None] * hits_UP * (_K1 + 1) / (hits_UP + room_P)).sum(0)
        total += float(weight_U.sum())
        covered += float(weight_U[having_U > 0].sum())
    return scores_P, covered / max(total, 1e-12)


def _fill(pieces: _Pieces, scores_P: Tensor | None, rows: int, sinks: int) -> Tensor:
    """Places `[N]`, ascending, of the sinks and of the best pieces; without scores, of rows that are spread evenly."""
    total = len(pieces.piece_T)
    first = min(sinks, rows)
    if scores_P is None:
        spread_N = torch.arange(rows - first) * (total - first) // max(rows - first, 1)
        return torch.cat([torch.arange(first), first + spread_N])
    rank_P = scores_P.argsort(descending=True, stable=True).argsort()
    rank_T = rank_P[pieces.piece_T]
    rank_T[:first] = -1
    return rank_T.argsort(stable=True)[:rows].sort().values


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
