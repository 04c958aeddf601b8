"""Fewer rows for attention: every c-th, means of c, or rows fitted so that attention gives what all rows gave.

Attention matching is Zweiger et al. 2026, "Fast KV Compaction via Attention Matching" (arXiv 2602.16284): a head's keys
are chosen among its rows', a weight of each is fitted so that the attention *mass* on them is that on all rows, and
their values so that attention's output is. Everything is closed form, over reference queries.

The paper adds the logarithm b of a weight to the key's logit. A KV cache has no place for that, so the key itself
carries it: `k + b u`, where `u` is the vector whose product with the reference queries is nearest to 1. Queries of a
trained model have a mean far from 0 (attention sinks live on it), so that there is one. What is lost is how much `q u`
differs from 1, times b; values are fitted after that, and make up for part of it.

Unlike the paper's, a fit here knows what a query sees beside the memory, its own window: errors count as much as they
change the output of both together.

Shape legend: `L` layers, `T` rows of a head, `N` rows that they become, `H` key/value heads, `Q` reference queries, `d`
head width.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from raymem.errors import InvalidInput

Compaction = Literal["subsample", "mean", "match"]
# a row stands for 1/20 of a row at least, and for 1,100 at most
_LEAST_BIAS, _MOST_BIAS = -3.0, 7.0
# of the mean eigenvalue: how strongly weights are drawn to 1, values to those of the rows, and `u` to 0
_WEIGHT_RIDGE, _VALUE_RIDGE, _CONSTANT_RIDGE = 1e-3, 1e-3, 1e-2
_WEIGHT_STEPS, _POWER_STEPS = 40, 6
# of the mean eigenvalue: makes definite what rounding made indefinite
_JITTER = 1e-4


class References(NamedTuple):
    """Queries of one head as they will look at the rows, and what each sees beside them: tokens of its own window.

    `queries_Qd` are scaled (divided by sqrt d) and turned to their positions; all query heads that share the
    key/value head are among them. `unseen_QT` bool: rows that a query must not see. `local_mass_Q` is the logarithm of
    the summed exp of its scores with its own window (-inf: it sees none) and `local_output_Qd` the attention output
    over that alone.
    """

    queries_Qd: Tensor
    unseen_QT: Tensor
    local_mass_Q: Tensor
    local_output_Qd: Tensor

    @classmethod
    def alone(cls, queries_Qd: Tensor, rows: int) -> References:
        """Queries that see all of so many rows, and nothing else."""
        count = len(queries_Qd)
        unseen_QT = torch.zeros(count, rows, dtype=torch.bool)
        mass_Q = queries_Qd.new_full((count,), -math.inf)
        return cls(queries_Qd, unseen_QT, mass_Q, torch.zeros_like(queries_Qd))


def check_compaction(how: str) -> Compaction:
    """A way to make fewer rows, by its name.

    Raises:
        InvalidInput: there is none of that name.
    """
    if how not in get_args(Compaction):
        raise InvalidInput(f"rows can't be compacted by {how[:80]!r}; choose among {', '.join(get_args(Compaction))}")
    return cast(Compaction, how)


def spread_places(count: int, rows: int, sinks: int = 4) -> Tensor:
    """Places `[N]` int64, ascending, of the first `sinks` of `count` rows and of others that are evenly spread.

    N is `rows`, or `count` where there are no more.
    """
    first = min(sinks, rows, count)
    if rows >= count:
        return torch.arange(count)
    left, spare = rows - first, count - first
    # the last of every stretch, as a compressor that subsamples keeps it
    return torch.cat([torch.arange(first), first + (torch.arange(1, left + 1) * spare) // max(1, left) - 1])


def pooled(rows_LTHd: Tensor, rows: int, sinks: int = 4) -> Tensor:
    """Position-free keys or values `[L, N, H, d]`: the first `sinks` as they are, then means of consecutive ones.

    Stretches are those whose last rows `spread_places` names.
    """
    last_N = spread_places(rows_LTHd.shape[1], rows, sinks)
    # where sinks take all places, the rows behind them are dropped
    seen_LTHd = rows_LTHd[:, : int(last_N[-1]) + 1]
    stretch_T = torch.searchsorted(last_N, torch.arange(seen_LTHd.shape[1]))
    wide = torch.promote_types(rows_LTHd.dtype, torch.float32)
    sums_LNHd = rows_LTHd.new_zeros(len(rows_LTHd), len(last_N), *rows_LTHd.shape[2:], dtype=wide)
    sums_LNHd.index_add_(1, stretch_T, seen_LTHd.to(wide))
    return (sums_LNHd / torch.bincount(stretch_T)[:, None, None]).to(rows_LTHd.dtype)


def matched(
    keys_Td: Tensor, values_Td: Tensor, references: References, rows: int, sinks: int = 4
) -> tuple[Tensor, Tensor]:
    """Keys and values `[N, d]` of a head over which attention gives nearly what it gives over all rows.

    Args:
        keys_Td: turned to their positions, float32 or float64, as everything here.
        values_Td: of the same rows.
        references: the queries that the fit is for.
        rows: N; all rows come back as they are where there are no more.
        sinks: how many of the first rows are among the chosen in any case.

    Returns:
        In the order of the rows that were chosen; keys are turned as those given.

    Reference:
        2602.16284 section 3: highest root mean square attention, then equations for weights and values.
    """
    if rows >= len(keys_Td):
        return keys_Td, values_Td
    scores_QT = (references.queries_Qd @ keys_Td.T).masked_fill_(references.unseen_QT, -math.inf)
    mass_Q = scores_QT.logsumexp(-1)
    total_Q = torch.logaddexp(mass_Q, references.local_mass_Q)
    share_QT = (scores_QT - total_Q[:, None]).exp_()
    wanted_Qd = share_QT @ values_Td + _local(references, total_Q)
    place_N = _most_attended(share_QT, rows, sinks)
    weights_N = _weights(share_QT[:, place_N], (mass_Q - total_Q).exp())
    keys_Nd = keys_Td[place_N] + weights_N.log()[:, None] * _constant_direction(references.queries_Qd)
    fitted_QN = (references.queries_Qd @ keys_Nd.T).masked_fill_(references.unseen_QT[:, place_N], -math.inf)
    total_Q = torch.logaddexp(fitted_QN.logsumexp(-1), references.local_mass_Q)
    share_QN = (fitted_QN - total_Q[:, None]).exp_()
    return keys_Nd, _values(share_QN, wanted_Qd - _local(references, total_Q), values_Td[place_N])


def _local(references: References, total_Q: Tensor) -> Tensor:
    """What its own window adds to each query's output `[Q, d]`."""
    return (references.local_mass_Q - total_Q).exp()[:, None] * references.local_output_Qd


def _most_attended(share_QT: Tensor, rows: int, sinks: int) -> Tensor:
    """Places `[N]`, ascending, of the sinks and of the rows with the highest root mean square of attention."""
    use_T = share_QT.square().mean(0)
    use_T[:sinks] = math.inf
    return use_T.topk(rows).indices.sort().values


def _weights(share_QN: Tensor, mass_Q: Tensor) -> Tensor:
    """How many rows each chosen one stands for `[N]`: bounded least squares on the mass, drawn to 1.

    Accelerated projected gradient (Beck and Teboulle 2009), from the clipped solution without bounds.
    """
    low, high = math.exp(_LEAST_BIAS), math.exp(_MOST_BIAS)
    gram_NN, toward_N = share_QN.T @ share_QN, share_QN.T @ mass_Q
    ridge = _WEIGHT_RIDGE * gram_NN.diagonal().mean().clamp_min(torch.finfo(gram_NN.dtype).tiny)
    gram_NN.diagonal().add_(ridge)
    toward_N = toward_N + ridge
    best_N = _solved(gram_NN, toward_N[:, None])[:, 0].clamp(low, high)
    ahead_N, pace, step = best_N, 1.0, 1 / _largest_eigenvalue(gram_NN)
    for _ in range(_WEIGHT_STEPS):
        after_N = (ahead_N - step * (gram_NN @ ahead_N - toward_N)).clamp(low, high)
        following = (1 + math.sqrt(1 + 4 * pace * pace)) / 2
        ahead_N = after_N + (pace - 1) / following * (after_N - best_N)
        best_N, pace = after_N, following
    return best_N


def _largest_eigenvalue(matrix_NN: Tensor) -> Tensor:
    """A bound from above for a matrix of positive entries: Collatz's, after some steps of the power method."""
    vector_N = torch.ones_like(matrix_NN[0])
    for _ in range(_POWER_STEPS):
        moved_N = matrix_NN @ vector_N
        vector_N = (moved_N / moved_N.amax()).clamp_min(torch.finfo(moved_N.dtype).eps)
    return ((matrix_NN @ vector_N) / vector_N).amax()


def _constant_direction(queries_Qd: Tensor) -> Tensor:
    """The vector `[d]` whose product with the queries is nearest to 1."""
    gram_dd = queries_Qd.T @ queries_Qd
    gram_dd.diagonal().add_(_CONSTANT_RIDGE * gram_dd.diagonal().mean())
    return _solved(gram_dd, queries_Qd.sum(0)[:, None])[:, 0]


def _values(share_QN: Tensor, wanted_Qd: Tensor, values_Nd: Tensor) -> Tensor:
    """Values `[N, d]` by ridge regression, drawn to those of the chosen rows."""
    gram_NN = share_QN.T @ share_QN
    gram_NN.diagonal().add_(_VALUE_RIDGE * gram_NN.diagonal().mean().clamp_min(torch.finfo(gram_NN.dtype).tiny))
    return values_Nd + _solved(gram_NN, share_QN.T @ (wanted_Qd - share_QN @ values_Nd))


def _solved(matrix_NN: Tensor, right_NM: Tensor) -> Tensor:
    """`matrix^-1 right` of a positive definite matrix."""
    factor_NN, failed = torch.linalg.cholesky_ex(matrix_NN)
    if int(failed):
        factor_NN = torch.linalg.cholesky(matrix_NN + _JITTER * matrix_NN.diagonal().mean() * torch.eye(len(matrix_NN)))
    return torch.cholesky_solve(right_NM, factor_NN)
