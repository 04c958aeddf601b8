"""Larimar against least squares by other means: lstsq, the paper's recursion, the Kanerva machine's update."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from raymem.errors import InvalidInput, InvalidSpec, InvalidTrace, Unsupported
from raymem.kernels.rls_update import to_grid
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.larimar import Larimar, LarimarOptions
from raymem.memory.reference import Reference

K, V, S = 23, 7, 19
LARGE = 2**24


def make(value: int = V, budget: int = LARGE, **options) -> Larimar:
    return Larimar(Dims(K, value), LarimarOptions(**({"memory_rows": S, "tokens": 16} | options)), budget)


def rows_of(count: int, seed: int = 0, value: int = V, vocabulary: int = 11) -> EncodedRows:
    generator = torch.Generator().manual_seed(seed)
    keys = normalize(torch.randn(count, K, generator=generator), dim=-1)
    tokens = torch.randint(vocabulary, (count,), generator=generator)
    values = torch.randn(count, value, generator=generator) if value else None
    number = torch.arange(count)
    return EncodedRows(keys, tokens, values, number, number, torch.zeros_like(number))


def pick(rows: EncodedRows, index) -> EncodedRows:
    values = None if rows.values_NV is None else rows.values_NV[index]
    origin = (rows.pos_N[index], rows.seq_N[index], rows.source_N[index])
    return EncodedRows(rows.keys_NK[index], rows.tokens_N[index], values, *origin)


def on_grid(rows: EncodedRows) -> np.ndarray:
    """Values as the memory takes them: multiples of 2^-16."""
    return to_grid(rows.values_NV.double()).numpy()


def ridge_by_lstsq(memory: Larimar, rows: EncodedRows) -> np.ndarray:
    """The ridge solution as plain least squares on rows extended by sqrt(lambda) I, solved by numpy."""
    weights = memory.address(rows.keys_NK).numpy()
    prior = np.sqrt(memory.larimar.ridge) * np.eye(weights.shape[1])
    values = on_grid(rows)
    extended = np.concatenate([values, np.zeros((len(prior), values.shape[1]))])
    return np.linalg.lstsq(np.concatenate([weights, prior]), extended, rcond=None)[0]


def error(memory: Larimar, state, expected: np.ndarray) -> float:
    return float(np.abs(memory.matrix(state)[0].numpy() - expected).max())


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_j1_what_fits_is_read_back():
    memory, rows = make(ridge=1e-9), rows_of(S - 2)
    found = memory.lookup(memory.absorb(memory.empty(), rows), rows.keys_NK, 3)
    # values lie on a grid of 1.5e-5
    assert torch.allclose(found.values_QV, rows.values_NV, atol=5e-5)


def test_j1_more_rows_than_the_memory_has_are_read_no_better_than_its_rank_allows():
    memory, rows = make(value=40, ridge=1e-9), rows_of(60, value=40)
    state = memory.absorb(memory.empty(), rows)
    values = torch.from_numpy(on_grid(rows))
    residual = memory.readout(state, memory.address(rows.keys_NK)[None])[0] - values
    best = torch.linalg.svdvals(values)[S:].square().sum()
    assert residual.square().sum() >= best * (1 - 1e-9)


@pytest.mark.parametrize("addressing", ["least_squares", "gaussian_filter"])
@pytest.mark.parametrize("count", [5, 50])
def test_j2_writing_in_any_order_and_pieces_is_batch_least_squares(addressing, count):
    memory, rows = make(addressing=addressing, filter_width=0.5, ridge=0.1), rows_of(count)
    state = memory.empty()
    for index in torch.randperm(count).split(3):
        state = memory.absorb(state, pick(rows, index))
    assert error(memory, state, ridge_by_lstsq(memory, rows)) < 1e-12


@pytest.mark.parametrize("count", [9, 60])
def test_j3_forgetting_a_row_is_batch_least_squares_without_it(count):
    memory, rows = make(ridge=0.01), rows_of(count)
    state = memory.absorb(memory.empty(), rows)
    left = torch.arange(count) != 4
    state = memory.forget(state, pick(rows, ~left))
    assert error(memory, state, ridge_by_lstsq(memory, pick(rows, left))) < 1e-11


def test_j4_the_papers_recursion_reaches_the_same_memory():
    memory, rows = make(ridge=0.3), rows_of(40)
    weights = memory.address(rows.keys_NK).numpy()
    gram, matrix = 0.3 * np.eye(S), np.zeros((S, V))
    for w, z in zip(weights, on_grid(rows), strict=True):
        gram += np.outer(w, w)
        matrix += np.outer(np.linalg.solve(gram, w), z - w @ matrix)
    assert error(memory, memory.absorb(memory.empty(), rows), matrix) < 1e-12


def test_j6_the_kanerva_update_reaches_the_same_memory():
    ridge, noise = 0.3, 0.7
    memory, rows = make(ridge=ridge), rows_of(40)
    weights = memory.address(rows.keys_NK).numpy()
    cover, matrix = noise / ridge * np.eye(S), np.zeros((S, V))
    for w, z in zip(weights, on_grid(rows), strict=True):
        gain = (w @ cover) / (w @ cover @ w + noise)
        matrix += np.outer(gain, z - w @ matrix)
        cover -= np.outer(gain, w @ cover)
    assert error(memory, memory.absorb(memory.empty(), rows), matrix) < 1e-12


def test_j4_merged_shards_are_the_whole():
    memory, rows = make(), rows_of(41)
    parts = [memory.absorb(memory.empty(), pick(rows, part)) for part in torch.arange(41).split(14)]
    merged = memory.merge(parts)
    assert error(memory, merged, ridge_by_lstsq(memory, rows)) < 1e-12
    assert int(merged["count"]) == 41


@pytest.mark.parametrize("options", [{"value": V}, {"value": 0}, {"value": 0, "cross_dtype": "float32"}])
def test_j5_writing_and_forgetting_gives_the_same_bits_as_before(options):
    memory, rows = make(**options), rows_of(30, value=options["value"])
    before = memory.absorb(memory.empty(), pick(rows, slice(0, 20)))
    kept = memory.dump(before)
    after = memory.dump(memory.forget(memory.absorb(before, pick(rows, slice(20, 30))), pick(rows, slice(20, 30))))
    for name in {"gram", "cross", "energy", "slot_token"} & kept.keys():
        assert torch.equal(kept[name], after[name]), name


def test_j7_a_key_equal_to_a_reference_row_points_at_it_alone():
    memory = make(addressing="gaussian_filter")
    weights = memory.address(memory.address.rows_SK.float())
    assert torch.equal(weights, torch.eye(S, dtype=torch.float64))


def test_a_thousand_random_edits_stay_batch_least_squares(figure):
    memory, rows = make(ridge=0.05), rows_of(400)
    generator = torch.Generator().manual_seed(3)
    state, held = memory.empty(), torch.zeros(400, dtype=torch.bool)
    for _ in range(1000):
        row = int(torch.randint(400, (), generator=generator))
        one = pick(rows, slice(row, row + 1))
        state = memory.forget(state, one) if held[row] else memory.absorb(state, one)
        held[row] = ~held[row]
    found = error(memory, state, ridge_by_lstsq(memory, pick(rows, held)))
    figure("larimar", "1,000 writes and forgets, distance from batch least squares", found, below=1e-10)


def test_twenty_rounds_of_writing_and_forgetting_leave_nothing(figure):
    memory = make(value=0, memory_rows=64)
    state = memory.empty()
    for round_ in range(20):
        rows = rows_of(60, seed=round_, value=0)
        state = memory.forget(memory.absorb(state, rows), rows)
    drift = memory.matrix(state).abs().max().item()
    figure("larimar", "20 rounds of writing and forgetting 60 rows, what is left", drift, below=0.0)
    assert not state["gram"].any()
    assert not state["scope_scale"].any()
    assert (state["slot_token"] == -1).all()


def test_the_forgotten_fact_is_at_chance_and_the_others_are_known(figure):
    memory = Larimar(Dims(64, 0), LarimarOptions(memory_rows=64, tokens=64, ridge=0.01), LARGE)
    keys = normalize(torch.randn(51, 64), dim=-1)
    number = torch.arange(51)
    rows = EncodedRows(keys, number + 100, None, number, number, number * 0)
    state = memory.absorb(memory.empty(), rows)
    assert (memory.lookup(state, keys, 1).tokens_Qk[:, 0] == rows.tokens_N).all()
    state = memory.forget(state, pick(rows, slice(7, 8)))
    found = memory.lookup(state, keys, 64)
    assert not (found.tokens_Qk == 107).any()
    others = number != 7
    known = (found.tokens_Qk[others, 0] == rows.tokens_N[others]).float().mean().item()
    figure("larimar", "facts still known after one of 51 was forgotten", known, above=0.95, paper="0.997 (CounterFact)")


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_rows_that_were_never_written_are_not_forgotten(ridge):
    memory, rows = make(ridge=ridge), rows_of(15)
    state = memory.absorb(memory.empty(), rows)
    kept = memory.dump(state)
    other_value = EncodedRows(rows.keys_NK[:1], rows.tokens_N[:1], rows.values_NV[:1] + 0.1, *([rows.pos_N[:1]] * 3))
    twice = pick(rows, torch.tensor([3, 3]))
    for unwritten in (rows_of(1, seed=9), other_value, twice):
        with pytest.raises(InvalidInput, match=r"can't have been written .* nothing was forgotten"):
            memory.forget(state, unwritten)
    assert all(torch.equal(kept[name], value) for name, value in memory.dump(state).items())


def test_a_row_written_twice_is_forgotten_twice():
    memory, rows = make(), rows_of(10)
    state = memory.absorb(memory.absorb(memory.empty(), rows), pick(rows, slice(3, 4)))
    state = memory.forget(state, pick(rows, torch.tensor([3, 3])))
    assert error(memory, state, ridge_by_lstsq(memory, pick(rows, torch.arange(10) != 3))) < 1e-12


def test_a_token_without_a_column_is_named_when_it_is_to_be_forgotten():
    memory, rows = make(value=0), rows_of(5, value=0)
    with pytest.raises(InvalidInput, match=f"row 0 followed by token {int(rows.tokens_N[0])}"):
        memory.forget(memory.empty(), rows)


def test_forgotten_keys_leave_the_scope_too():
    memory, rows = make(), rows_of(12)
    state = memory.forget(memory.absorb(memory.empty(), rows), pick(rows, slice(0, 1)))
    similar = memory.lookup(state, rows.keys_NK, 1).similarity_Q
    assert similar[0] < 0.9
    assert (similar[1:] > 0.99).all()


def test_scores_are_log_probabilities_over_the_tokens_held():
    memory, rows = make(value=0), rows_of(40, value=0)
    found = memory.lookup(memory.absorb(memory.empty(), rows), rows.keys_NK, 16)
    assert torch.allclose(found.scores_Qk.exp().sum(1), torch.ones(40), atol=1e-5)
    assert (found.tokens_Qk[:, 11:] == -1).all()
    assert (found.scores_Qk.diff(dim=1)[:, :10] <= 0).all()


@pytest.mark.parametrize("cuts", [[1] * 70, [35, 0, 35], [7, 63]])
def test_columns_change_hands_row_by_row_however_rows_are_cut(cuts):
    memory, rows = make(value=0, tokens=16), rows_of(70, value=0, vocabulary=30)
    whole = memory.absorb(memory.empty(), rows)
    state = memory.empty()
    for index in torch.arange(70).split(cuts):
        state = memory.absorb(state, pick(rows, index))
    # sums on the grid are exact: not a bit differs
    assert all(torch.equal(whole[name], state[name]) for name in whole)


def test_an_evicted_token_takes_its_rows_values_with_it():
    memory, rows = make(value=0, tokens=16), rows_of(70, value=0, vocabulary=30)
    state = memory.absorb(memory.empty(), rows)
    # the 16 tokens seen last, each with the rows since it last came in
    table, since = [], {}
    for row, token in enumerate(rows.tokens_N.tolist()):
        if token in table:
            table.remove(token)
        else:
            since[token] = row
        table = [*table, token][-16:]
    assert set(state["slot_token"][0].tolist()) == set(table)
    weights = memory.address(rows.keys_NK)
    for column, token in enumerate(state["slot_token"][0].tolist()):
        mine = (rows.tokens_N == token) & (torch.arange(70) >= since[token])
        assert torch.equal(state["cross"][0, :, column], weights[mine].sum(0))


def test_merging_token_banks_is_exact_in_any_order_and_can_be_forgotten_from():
    memory, rows = make(value=0, tokens=32), rows_of(60, value=0, vocabulary=30)
    parts = [memory.absorb(memory.empty(), pick(rows, part)) for part in torch.arange(60).split(20)]
    whole = memory.absorb(memory.empty(), rows)
    merged, reverse = memory.merge(parts), memory.merge(parts[::-1])
    # columns stand in another order than in the whole, but what is read is the same
    for state in (merged, reverse):
        a, b = memory.lookup(state, rows.keys_NK, 5), memory.lookup(whole, rows.keys_NK, 5)
        assert torch.equal(a.tokens_Qk, b.tokens_Qk)
        assert torch.allclose(a.scores_Qk, b.scores_Qk, rtol=1e-6)
        assert torch.equal(a.similarity_Q, b.similarity_Q)
    assert all(torch.equal(merged[name], reverse[name]) for name in merged)
    again = memory.forget(merged, pick(rows, slice(40, 60)))
    assert torch.equal(again["gram"], memory.merge(parts[:2])["gram"])


def test_merging_more_tokens_than_there_are_columns_is_refused():
    memory = make(value=0, tokens=16)
    parts = [memory.absorb(memory.empty(), rows_of(30, seed, value=0, vocabulary=9 * (1 + seed))) for seed in (0, 2)]
    with pytest.raises(Unsupported, match="columns for 16"):
        memory.merge(parts)


def test_gradients_reach_keys_and_values_through_writing_and_reading():
    memory, rows = make(), rows_of(9)
    values = to_grid(rows.values_NV.double(), 5)[None].requires_grad_()
    keys = rows.keys_NK.double()[None]

    def read(values):
        state = memory.init_state(1)
        state["scope_scale"] = state["scope_scale"].double()
        return memory.read(memory.write(state, keys, values, rows.tokens_N[None]), keys, 1).values_BQV

    with torch.enable_grad():
        # reading is linear in the values: steps along the grid find the slope exactly
        assert torch.autograd.gradcheck(read, values, eps=2.0**-6)
        keys.requires_grad_()
        read(values).square().sum().backward()
    assert torch.isfinite(keys.grad).all()
    assert keys.grad.abs().max() > 0


def test_a_write_with_gradients_leaves_the_old_state_alone():
    memory, rows = make(), rows_of(9)
    state = memory.absorb(memory.empty(), rows)
    kept = memory.dump(state)
    with torch.enable_grad():
        memory.absorb(state, rows)
    assert all(torch.equal(kept[name], value) for name, value in memory.dump(state).items())


def test_a_budget_gives_as_many_token_columns_as_it_pays_for():
    memory = make(value=0, tokens=4096, budget=64 * 1024)
    assert 16 <= memory.width < 4096
    assert memory.nbytes(memory.empty()) <= 64 * 1024 < memory.nbytes(memory.empty()) + 8 * S + 24


@pytest.mark.parametrize("value", [0, V, 500])
def test_a_budget_too_small_is_refused_with_its_numbers(value):
    with pytest.raises(InvalidSpec, match=r"budget_bytes=1024 leaves a larimar bank of key width 23 -?\d+ memory rows"):
        make(value=value, budget=1024)


@pytest.mark.parametrize("value", [0, V, 500])
def test_a_small_budget_is_used_up(value):
    memory = Larimar(Dims(400, value), LarimarOptions(), 150_000)
    assert 0.95 * 150_000 <= memory.nbytes(memory.empty()) <= 150_000


def test_narrow_columns_hold_the_same_sums():
    rows = rows_of(60, value=0)
    wide, narrow = make(value=0), make(value=0, cross_dtype="float32")
    wide.address.grid_bits = narrow.address.grid_bits
    states = [memory.absorb(memory.empty(), rows) for memory in (wide, narrow)]
    assert torch.equal(states[0]["cross"].float(), states[1]["cross"])
    assert torch.equal(states[0]["gram"], states[1]["gram"])


def test_rows_without_the_vectors_that_a_bank_keeps_are_refused():
    memory = make()
    with pytest.raises(InvalidTrace, match="vectors of width 7"):
        memory.absorb(memory.empty(), rows_of(3, value=0))


def test_the_reference_memory_is_the_same_everywhere():
    first, second = make(seed=4), make(seed=4)
    assert torch.equal(first.address.rows_SK, second.address.rows_SK)
    assert not torch.equal(first.address.rows_SK, make(seed=5).address.rows_SK)
    assert torch.allclose(first.address.rows_SK.norm(dim=1), torch.ones(S, dtype=torch.float64))
    wide = Reference(3 * K + 1, K, 0, "least_squares")
    assert torch.allclose(wide.inverse_KS @ wide.rows_SK, torch.eye(K, dtype=torch.float64))
