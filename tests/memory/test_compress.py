"""Rows made fewer: what is exact, and that attention over fitted rows loses less than over rows that were picked."""

import math

import pytest
import torch

from raymem.errors import InvalidInput
from raymem.memory.compress import References, check_compaction, matched, pooled, spread_places

D = 16


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def queries(count: int, seed: int = 1) -> torch.Tensor:
    """As a trained model's: their mean is far from 0."""
    return (drawn(count, D, seed=seed) + 3 * drawn(D, seed=99)) / D**0.5


def attend(queries_Qd, keys_Nd, values_Nd):
    """Output and logarithm of the mass."""
    scores_QN = queries_Qd @ keys_Nd.T
    return torch.softmax(scores_QN, -1) @ values_Nd, scores_QN.logsumexp(-1)


@pytest.mark.parametrize("count", [1, 4, 5, 63, 100])
@pytest.mark.parametrize("rows", [1, 3, 4, 25, 63, 1000])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_spread_places_keep_sinks_and_end_with_the_newest(count, rows, sinks):
    place_N = spread_places(count, rows, sinks)
    assert len(place_N) == min(rows, count)
    assert bool((place_N.diff() > 0).all())
    assert place_N[: min(sinks, len(place_N))].tolist() == list(range(min(sinks, len(place_N))))
    if rows > sinks:
        assert place_N[-1] == count - 1
        assert int(place_N[sinks:].diff().amax() if len(place_N) > sinks + 1 else 0) <= math.ceil(
            count / (rows - sinks)
        )


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (63, 20), (100, 33), (100, 100), (10, 64)])
def test_pooled_rows_are_means_of_the_stretches_that_subsampling_ends(count, rows):
    rows_LTHd = drawn(2, count, 3, D)
    last = spread_places(count, rows, 4).tolist()
    first = [0, *(place + 1 for place in last[:-1])]
    expected = torch.stack([rows_LTHd[:, a : b + 1].mean(1) for a, b in zip(first, last, strict=True)], 1)
    torch.testing.assert_close(pooled(rows_LTHd, rows), expected)
    assert torch.equal(pooled(rows_LTHd, rows)[:, :4], rows_LTHd[:, : min(4, rows)])
    assert torch.equal(pooled(rows_LTHd, count), rows_LTHd)
    assert pooled(rows_LTHd.bfloat16(), rows).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [63, 64, 200])
def test_as_many_rows_come_back_as_they_are(rows):
    keys_Td, values_Td = drawn(63, D), drawn(63, D, seed=2)
    found = matched(keys_Td, values_Td, References.alone(queries(40), 63), rows)
    assert torch.equal(found[0], keys_Td)
    assert torch.equal(found[1], values_Td)


@pytest.mark.parametrize("times", [2, 5])
def test_rows_that_came_several_times_become_one_of_their_weight(times):
    # one dimension of the queries is 1: there is a direction whose product with all of them is the same
    queries_Qd = torch.cat([torch.ones(300, 1, dtype=torch.float64), drawn(300, D - 1, seed=1) / D**0.5], 1)
    keys_Nd, values_Nd = drawn(20, D), drawn(20, D, seed=2)
    keys_Td, values_Td = keys_Nd.repeat(times, 1), values_Nd.repeat(times, 1)
    found = matched(keys_Td, values_Td, References.alone(queries_Qd, len(keys_Td)), 20 * times - 1, sinks=0)
    other = queries_Qd[:100] + torch.cat([torch.zeros(100, 1).double(), 0.1 * drawn(100, D - 1, seed=3)], 1)
    output_Qd, mass_Q = attend(other, keys_Td, values_Td)
    found_Qd, found_mass_Q = attend(other, *found)
    # outputs and masses are of order 1; ridges of a thousandth draw the fit elsewhere
    torch.testing.assert_close(found_Qd, output_Qd, atol=1e-2, rtol=0)
    torch.testing.assert_close(found_mass_Q, mass_Q, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("count", "rows"), [(200, 25), (301, 100), (63, 20)])
def test_unseen_queries_get_nearly_what_all_rows_give(count, rows):
    keys_Td, values_Td = 2 * drawn(count, D), drawn(count, D, seed=2)
    found = matched(keys_Td, values_Td, References.alone(queries(4 * count), count), rows)
    place_N = spread_places(count, rows)
    picked = (keys_Td[place_N], values_Td[place_N])
    other = queries(500, seed=7)
    output_Qd, mass_Q = attend(other, keys_Td, values_Td)

    def lost(rows_Nd):
        output, mass = attend(other, *rows_Nd)
        return float((output - output_Qd).square().mean()), float((mass - mass_Q).abs().mean())

    # a fit that forgot the bias, or the values, loses one of the two
    assert lost(found)[0] < 0.35 * lost(picked)[0]
    assert lost(found)[1] < 0.35 * lost(picked)[1]
    assert found[0].shape == found[1].shape == (rows, D)


def test_a_fit_looks_at_what_the_query_s_own_window_leaves_to_the_rows():
    keys_Td, values_Td, queries_Qd = 2 * drawn(200, D), drawn(200, D, seed=2), queries(400)
    # the first half of the queries is busy with its own window: what the rows give them changes nothing
    local_Q = torch.where(torch.arange(400) < 200, 60.0, -math.inf).double()
    seen = References(queries_Qd, torch.zeros(400, 200, dtype=torch.bool), local_Q, torch.zeros_like(queries_Qd))
    whole = matched(keys_Td, values_Td, seen, 20)
    half = matched(keys_Td, values_Td, References.alone(queries_Qd[200:], 200), 20)
    everyone = matched(keys_Td, values_Td, References.alone(queries_Qd, 200), 20)
    output_Qd, _ = attend(queries_Qd[200:], keys_Td, values_Td)

    def error(found):
        return float((attend(queries_Qd[200:], *found)[0] - output_Qd).square().mean())

    assert error(whole) < 1.1 * error(half)
    assert error(whole) < 0.9 * error(everyone)


def test_rows_that_no_query_sees_are_not_chosen():
    keys_Td, values_Td = drawn(100, D), drawn(100, D, seed=2)
    seen = References.alone(queries(200), 100)
    seen.unseen_QT[:, 50:] = True
    keys_Nd, values_Nd = matched(keys_Td, values_Td, seen, 20)
    hidden = matched(
        torch.cat([keys_Td[:50], 9 * keys_Td[50:]]), torch.cat([values_Td[:50], 9 * values_Td[50:]]), seen, 20
    )
    assert torch.equal(keys_Nd, hidden[0])
    assert torch.equal(values_Nd, hidden[1])


def test_sinks_are_among_the_rows_though_no_query_looks_at_them():
    queries_Qd = queries(200)
    # a direction away from all queries
    keys_Td = torch.cat([-50 * queries_Qd.mean(0).expand(4, -1), drawn(96, D)])
    values_Td = torch.cat([torch.full((4, D), 7.0).double(), drawn(96, D, seed=2)])
    found = matched(keys_Td, values_Td, References.alone(queries_Qd, 100), 12)
    torch.testing.assert_close(found[1][:4], values_Td[:4])


def test_no_gradient_is_kept_and_nothing_given_changes():
    keys_Td, values_Td, seen = (
        drawn(60, D).float(),
        drawn(60, D, seed=2).float(),
        References.alone(queries(90).float(), 60),
    )
    before = [keys_Td.clone(), values_Td.clone(), *(part.clone() for part in seen)]
    found = matched(keys_Td, values_Td, seen, 9)
    assert all(torch.equal(a, b) for a, b in zip(before, [keys_Td, values_Td, *seen], strict=True))
    assert all(bool(part.isfinite().all()) and part.dtype == torch.float32 for part in found)


def test_unknown_ways_are_named():
    assert check_compaction("mean") == "mean"
    with pytest.raises(InvalidInput, match="'median'; choose among subsample, mean, match"):
        check_compaction("median")
