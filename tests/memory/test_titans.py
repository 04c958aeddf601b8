"""Titans against its closed forms, its peer, and plain autograd (mechanisms.md section 6)."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from raymem.errors import InvalidSpec, InvalidTrace
from raymem.memory import build, nets
from raymem.memory.base import Dims
from raymem.memory.codes import SignCode, seat

# float64, products of at most a few hundred terms of size one
EXACT = {"rtol": 1e-12, "atol": 1e-12}
BUDGET = 2**24


def bank(key, value, banks=1, **options):
    memory = build("titans", Dims(key, value), options, BUDGET)
    state = memory.init_state(banks)
    return memory, {n: t.double() if t.is_floating_point() else t for n, t in state.items()}


def orthonormal(count, width):
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0][:count]


def unit(*shape):
    return normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def tokens_for(keys):
    return torch.zeros(keys.shape[:2], dtype=torch.int64)


def settled(memory, state):
    return memory._look_ahead(state)["weight_0"]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_j1_orthonormal_keys_are_stored_exactly_and_overwriting_one_spares_the_others(chunk):
    memory, state = bank(12, 5, chunk=chunk)
    keys, values = orthonormal(9, 12)[None], torch.randn(1, 9, 5, dtype=torch.float64)
    state = memory.write(state, keys, values, tokens_for(keys))
    torch.testing.assert_close(memory.read(state, keys, 1).values_BQV, values, **EXACT)
    values[0, 3] = torch.randn(5, dtype=torch.float64)
    state = memory.write(state, keys[:, 3:4], values[:, 3:4], tokens_for(keys[:, :1]))
    torch.testing.assert_close(memory.read(state, keys, 1).values_BQV, values, **EXACT)


@pytest.mark.parametrize("chunk", [1, 6])
def test_j2_without_momentum_and_decay_it_is_the_delta_rule_in_wy_form(chunk):
    memory, state = bank(12, 7, chunk=chunk, theta=0.3)
    keys, values = unit(1, 20, 12), torch.randn(1, 20, 7, dtype=torch.float64)
    first = torch.randn(12, 7, dtype=torch.float64)
    state["weight_0"] = first[None]
    got = settled(memory, memory.write(state, keys, values, tokens_for(keys)))
    k, v, b = keys[0], values[0], 2 * 0.3
    solved = torch.linalg.inv(torch.eye(20, dtype=torch.float64) + torch.tril(b * k @ k.T, -1)) * b
    torch.testing.assert_close(got[0], first + k.T @ (solved @ v - solved @ k @ first), **EXACT)


@pytest.mark.parametrize("chunk", [1, 5])
def test_j3_full_decay_leaves_the_momentum_alone_and_no_step_leaves_decay_alone(chunk):
    keys, values = unit(1, 10, 6), torch.randn(1, 10, 4, dtype=torch.float64)
    memory, state = bank(6, 4, chunk=chunk, alpha=1.0, eta=0.6, theta=0.2)
    state = memory.write(state, keys, values, tokens_for(keys))
    torch.testing.assert_close(state["weight_0"], state["momentum_0"], **EXACT)
    memory, state = bank(6, 4, chunk=chunk, alpha=0.25, theta=0.0)
    state["weight_0"] = torch.randn(1, 6, 4, dtype=torch.float64)
    after = memory.write(state, keys, values, tokens_for(keys))
    torch.testing.assert_close(after["weight_0"], 0.75**10 * state["weight_0"], **EXACT)


def test_j4_gradients_taken_at_the_chunk_s_start_give_the_closed_form_with_momentum(figure):
    memory, state = bank(6, 4, gradient="chunk", chunk=7, theta=0.2, eta=0.7, alpha=0.05)
    keys, values = unit(1, 7, 6), torch.randn(1, 7, 4, dtype=torch.float64)
    first = torch.randn(6, 4, dtype=torch.float64)
    state["weight_0"] = first[None]
    got = memory.write(state, keys, values, tokens_for(keys))["weight_0"][0]
    beta = [0.95 ** (t + 1) for t in range(7)]
    expected = beta[6] * first
    for t in range(7):
        gradient = 2 * torch.outer(keys[0, t], keys[0, t] @ first - values[0, t])
        weight = sum(beta[6] / beta[j] * 0.7 ** (j - t) for j in range(t, 7))
        expected = expected - 0.2 * weight * gradient
    figure("titans", "distance from the closed form with momentum", (got - expected).abs().max().item(), below=1e-12)


@pytest.mark.parametrize("options", [{"values": "onehot"}, {"values": "softmax"}, {"values": "signs", "depth": 2}])
def test_j5_splitting_the_stream_makes_no_difference_at_all(options):
    memory, whole = bank(8, 0, slots=16, **options)
    keys, tokens = unit(1, 61, 8), torch.randint(40, (1, 61))
    parts = whole
    for part in (slice(0, 1), slice(1, 1), slice(1, 30), slice(30, 61)):
        parts = memory.write(parts, keys[:, part], None, tokens[:, part])
    whole = memory.write(whole, keys, None, tokens)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("gates", [{}, {"eta": 0.6, "alpha": 0.02, "theta": 0.2}])
def test_chunked_and_per_token_writing_agree(gates):
    keys, values = unit(2, 35, 9), torch.randn(2, 35, 4, dtype=torch.float64)
    weights = []
    for chunk in (1, 5, 32):
        memory, state = bank(9, 4, banks=2, chunk=chunk, **gates)
        weights.append(settled(memory, memory.write(state, keys, values, tokens_for(keys))))
    torch.testing.assert_close(weights[1], weights[0], **EXACT)
    torch.testing.assert_close(weights[2], weights[0], **EXACT)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_it_equals_titans_pytorch(depth, momentum):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from titans_pytorch import MemoryMLP, NeuralMemory
    torch.manual_seed(depth)
    width, step, decay, bias = 8, 0.3, -3.0, 0.375
    peer = NeuralMemory(
        dim=width,
        chunk_size=1,
        batch_size=1,
        model=MemoryMLP(width, depth=depth),
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
        momentum=momentum,
        default_step_transform_max_lr=step,
        init_adaptive_step_bias=0.0,
        init_decay_bias=decay,
        **({"init_momentum_bias": bias} if momentum else {}),
    ).double()
    x = torch.randn(1, 11, width, dtype=torch.float64)
    with torch.no_grad():
        learned = peer(x)[1].states[0]
        keys, values = peer.to_keys(x), peer.to_values(x)
    gate = torch.sigmoid(torch.tensor([decay, bias], dtype=torch.float64)).tolist()
    memory, state = bank(
        width,
        width,
        chunk=1,
        depth=depth,
        expansion=2.0,
        # its loss is a mean over features: the same update needs a step that many times smaller here
        theta=step / 2 / width,
        alpha=gate[0],
        eta=gate[1] if momentum else 0.0,
    )
    for layer, first in enumerate(peer.memory_model_parameters):
        state[f"weight_{layer}"] = first.detach().reshape(1, *first.shape[-2:])
    state = memory.write(state, keys, values, tokens_for(keys))
    for layer in range(depth):
        torch.testing.assert_close(state[f"weight_{layer}"][0], learned[f"weights.{layer}"][0], **EXACT)


@pytest.mark.parametrize("residual_norm", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_written_out_gradient_is_autograd_s(depth, residual_norm):
    widths = [6] * (depth + 1)
    weights = [torch.randn(2, a, b, dtype=torch.float64) for a, b in pairwise(widths)]
    keys, values = unit(2, 4, 6), torch.randn(2, 4, 6, dtype=torch.float64)
    found = nets.signals(weights, keys, lambda out: 2 * (out - values), residual_norm=residual_norm)
    leaves = [weight.clone().requires_grad_() for weight in weights]
    for t in range(4):
        out = nets.forward(leaves, keys[:, t : t + 1], residual_norm=residual_norm)
        wanted = torch.autograd.grad((out - values[:, t : t + 1]).square().sum(), leaves)
        for layer in range(depth):
            got = found.inputs[layer][:, t, :, None] * found.deltas[layer][:, t, None]
            torch.testing.assert_close(got, wanted[layer], rtol=1e-10, atol=1e-10)


def test_softmax_memory_descends_the_cross_entropy():
    memory, state = bank(6, 0, slots=16, chunk=5, theta=0.5, eta=0.0)
    keys, tokens = unit(1, 10, 6), torch.tensor([[3, 9, 3, 4, 9, 4, 3, 9, 9, 3]])
    got = memory.write(state, keys, None, tokens)
    weight = torch.zeros(6, 3, dtype=torch.float64)
    place = {3: 0, 9: 1, 4: 2}
    for start in (0, 5):
        leaf = weight.clone().requires_grad_()
        wanted = torch.tensor([place[token] for token in tokens[0, start : start + 5].tolist()])
        loss = cross_entropy(keys[0, start : start + 5] @ leaf, wanted, reduction="sum")
        weight = weight - 0.5 * torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(got["weight_0"][0, :, :3], weight, **EXACT)
    assert not got["weight_0"][0, :, 3:].any()
    assert got["slot_token"][0, :4].tolist() == [3, 9, 4, -1]
    answer = memory.read(got, keys, 16)
    # scores are the memory's own log-probabilities
    torch.testing.assert_close(answer.scores_BQk.exp().sum(-1), torch.ones(1, 10, dtype=torch.float64), **EXACT)


def test_rows_of_an_unfinished_chunk_wait_but_are_read():
    memory, state = bank(16, 0, values="onehot", chunk=16)
    keys, tokens = orthonormal(5, 16)[None], torch.tensor([[11, 12, 13, 14, 15]])
    state = memory.write(state, keys, None, tokens)
    assert not state["weight_0"].any()
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert memory.read(state, keys, 1).tokens_BQk[0, :, 0].tolist() == tokens[0].tolist()
    assert all(torch.equal(before[name], state[name]) for name in state)


@pytest.mark.parametrize("options", [{}, {"values": "signs", "depth": 2, "gradient": "chunk"}])
def test_reusing_storage_without_gradients_changes_no_result(options):
    memory, state = bank(8, 0, **options)
    keys, tokens = unit(1, 40, 8), torch.randint(30, (1, 40))
    functional = memory.read(memory.write(state, keys, None, tokens), keys, 5)
    with torch.no_grad():
        state = memory.write(state, keys, None, tokens)
        for _ in range(2):
            answer = memory.read(state, keys, 5)
            for got, expected in zip(answer, functional, strict=True):
                torch.testing.assert_close(got, expected, **EXACT)


def test_surprise_is_high_for_the_new_and_low_for_the_known():
    memory, state = bank(16, 0, values="softmax", chunk=4)
    keys = orthonormal(8, 16)[None]
    tokens = torch.arange(8)[None]
    fresh = memory.surprise(state, keys, None, tokens)
    for _ in range(12):
        state = memory.write(state, keys, None, tokens)
    known = memory.surprise(state, keys, None, tokens)
    assert bool((known < 0.3).all())
    answer = memory.read(state, keys, 8)
    own = answer.scores_BQk[answer.tokens_BQk == tokens[..., None]]
    torch.testing.assert_close(known[0], -own, **EXACT)
    unseen = memory.surprise(state, keys, None, tokens + 100)
    assert bool((unseen > known + 2).all())
    # nothing known: one candidate, the token itself, with all the mass
    torch.testing.assert_close(fresh, torch.zeros_like(fresh))


@pytest.mark.parametrize("values", ["onehot", "signs"])
def test_surprise_is_the_loss_that_a_write_of_the_row_would_start_from(values):
    memory, state = bank(16, 0, values=values, chunk=1, code_width=32)
    keys, tokens = unit(1, 6, 16), torch.tensor([[1, 2, 3, 4, 2, 77]])
    state = memory.write(state, keys[:, :5], None, tokens[:, :5])
    grown, _ = memory.code.enter(state, tokens[:, 5:], torch.tensor([1]))
    target = memory.code.target(state | grown, tokens[:, 5:], torch.float64)
    expected = (keys[:, 5:] @ state["weight_0"] - target).square().sum(-1)
    torch.testing.assert_close(memory.surprise(state, keys[:, 5:], None, tokens[:, 5:]), expected, **EXACT)


def test_a_full_table_gives_up_the_token_not_seen_for_longest_and_what_was_learned_of_it():
    memory, state = bank(20, 0, values="onehot", slots=16, chunk=2)
    keys, tokens = orthonormal(18, 20)[None], torch.arange(18)[None]
    state = memory.write(state, keys[:, :16], None, tokens[:, :16])
    # token 0 is seen again, so that 1 and 2 are the oldest when 16 and 17 come
    again = torch.tensor([[0, 3]])
    state = memory.write(state, keys[:, [0, 3]], None, again)
    state = memory.write(state, keys[:, 16:], None, tokens[:, 16:])
    assert sorted(state["slot_token"][0].tolist()) == [0, *range(3, 18)]
    answer = memory.read(state, keys, 16)
    assert answer.tokens_BQk[0, [0, 3, 4, 16, 17], 0].tolist() == [0, 3, 4, 16, 17]
    # nothing is left of 1 and 2: their keys now score zero for every token
    torch.testing.assert_close(answer.scores_BQk[0, 1:3], torch.zeros(2, 16, dtype=torch.float64), **EXACT)


def test_a_chunk_never_takes_a_slot_that_it_uses_itself():
    table = torch.tensor([[5, 6, 7, -1]])
    used = torch.tensor([[1, 2, 3, 0]])
    # 5 is the oldest, but the chunk needs it; 8 takes the free slot, 9 the oldest other one
    token, when, changed = seat(table, used, torch.tensor([[8, 9, 5, 8]]), torch.tensor([4]))
    assert token.tolist() == [[5, 9, 7, 8]]
    assert changed.tolist() == [[False, True, False, False]]
    assert when.tolist() == [[6, 5, 3, 7]]
    same = seat(table, used, torch.tensor([[8, 9, 5, 8]]), torch.tensor([0]))
    assert torch.equal(same[0], table)
    assert torch.equal(same[1], used)


def test_clipping_shortens_long_gradients_and_leaves_short_ones_alone():
    inputs = torch.eye(4, dtype=torch.float64)[None] * torch.tensor([0.0, 1e-6, 1.0, 10.0])[:, None]
    found = nets.Signals([inputs], [torch.ones(1, 4, 1, dtype=torch.float64)])
    theta = nets.clipped(torch.full((1, 4), 0.5, dtype=torch.float64), found, 1.0)
    torch.testing.assert_close(theta, torch.tensor([[0.5, 0.5, 0.5, 0.05]], dtype=torch.float64), **EXACT)
    memory, state = bank(6, 4, clip=0.01, theta=0.5)
    keys, values = unit(1, 1, 6), torch.randn(1, 1, 4, dtype=torch.float64)
    moved = memory.write(state, keys, values, tokens_for(keys))["weight_0"]
    assert float(moved.norm()) == pytest.approx(0.5 * 0.01, rel=1e-9)
    # an all-zero gradient neither writes nor breaks
    still = memory.write(state, keys, 0 * values, tokens_for(keys))["weight_0"]
    assert not still.any()


@pytest.mark.parametrize("options", [{}, {"gradient": "chunk", "chunk": 4}, {"depth": 2, "expansion": 1.0}])
def test_learned_gates_and_first_weights_get_gradients_through_writing(options):
    torch.manual_seed(0)
    memory = build("titans", Dims(8, 3), {"learned": True, "theta": 0.2, **options}, BUDGET)
    keys, values = unit(2, 10, 8).float(), torch.randn(2, 10, 3)

    def loss():
        state = memory.write(memory.init_state(2), keys, values, tokens_for(keys))
        return (memory.read(state, keys, 1).values_BQV - values).square().mean()

    before = loss()
    before.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in memory.parameters())
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
    optimizer.step()
    assert loss() < before


def test_gradients_reach_keys_and_values_through_writing_and_reading():
    memory, state = bank(5, 3, chunk=4, eta=0.3, theta=0.2, alpha=0.1)
    keys, values, query = (t.requires_grad_() for t in (unit(1, 6, 5), torch.randn(1, 6, 3).double(), unit(1, 2, 5)))

    def answer(keys, values, query):
        return memory.read(memory.write(state, keys, values, tokens_for(keys)), query, 1).values_BQV

    assert torch.autograd.gradcheck(answer, (keys, values, query))


def test_an_untaught_network_of_any_depth_says_nothing():
    for options in ({}, {"depth": 3}, {"residual_norm": True}):
        memory, state = bank(8, 8, **options)
        assert not memory.read(state, unit(1, 3, 8), 2).values_BQV.any()


# recall at 1 of n pairs with random unit keys of width 64, after one pass (mechanisms.md 6h; means of 20 runs there)
CAPACITY: dict[str, tuple[dict[str, float], dict[int, float]]] = {
    "exact step": ({"theta": 0.5}, {16: 1.0, 48: 0.98, 64: 0.90, 128: 0.55}),
    "half step": ({"theta": 0.25}, {16: 1.0, 48: 1.0, 64: 1.0, 128: 0.83}),
    # a step of 0.1 on half the gradient there
    "momentum": ({"theta": 0.05, "eta": 0.9}, {16: 0.95, 48: 0.96, 64: 0.95, 128: 0.61}),
    "decay .02": ({"theta": 0.5, "alpha": 0.02}, {16: 1.0, 48: 0.84, 64: 0.67, 128: 0.33}),
}


@pytest.mark.parametrize("rule", sorted(CAPACITY))
def test_the_capacity_table_is_reproduced(rule, figure):
    options, table = CAPACITY[rule]
    for pairs, expected in table.items():
        memory = build("titans", Dims(64, 64), options, BUDGET)
        keys, values = unit(20, pairs, 64).float(), unit(20, pairs, 64).float()
        state = memory.write(memory.init_state(20), keys, values, tokens_for(keys))
        nearest = (memory.read(state, keys, 1).values_BQV @ values.mT).argmax(-1)
        found = nearest == torch.arange(pairs)
        # 20 runs of n pairs: a standard error of 0.01 to 0.03
        assert float(found.float().mean()) == pytest.approx(expected, abs=0.08), (pairs, expected)
        if rule == "exact step":
            assert bool(found[:, -8:].all()), "what was written last is recalled"
    # the last of the table: 128 pairs in a matrix of width 64
    figure("titans", f"128 pairs in width 64 recalled, {rule}", float(found.float().mean()), above=expected - 0.08)


def test_overwriting_a_key_returns_the_second_value():
    memory, state = bank(64, 4)
    key, values = unit(1, 1, 64), torch.randn(1, 2, 4, dtype=torch.float64)
    state = memory.write(state, key.expand(-1, 2, -1), values, torch.zeros(1, 2, dtype=torch.int64))
    torch.testing.assert_close(memory.read(state, key, 1).values_BQV, values[:, 1:], **EXACT)


def test_sign_codes_of_different_tokens_are_nearly_orthogonal():
    code = SignCode(16, 512)
    codes = code.target({}, torch.tensor([[0, 1, 2, 50_000, 151_935]]), torch.float64)[0]
    torch.testing.assert_close(codes.square().sum(-1), torch.ones(5, dtype=torch.float64), **EXACT)
    off = codes @ codes.T - torch.eye(5, dtype=torch.float64)
    # standard deviation 1 / sqrt(512)
    assert float(off.abs().max()) < 5 / 512**0.5


def test_sizes_follow_the_budget():
    small = build("titans", Dims(64, 0), {}, 40_000)
    large = build("titans", Dims(64, 0), {}, 2**22)
    assert 16 <= small.code.width < large.code.width == 1024
    for memory, budget in ((small, 40_000), (large, 2**22)):
        assert memory.nbytes(memory.empty()) <= budget
    # what is left over is less than one more token would take
    assert 40_000 - small.nbytes(small.empty()) < 64 * 8 + 16


def test_options_that_can_t_work_are_refused():
    with pytest.raises(InvalidSpec, match="key width 8, output width 5"):
        build("titans", Dims(8, 5), {"residual_norm": True}, BUDGET)
    with pytest.raises(InvalidSpec, match="names none"):
        build("titans", Dims(8, 0), {"values": "vectors"}, BUDGET)
    with pytest.raises(InvalidSpec, match=r"titans option eta=1\.0"):
        build("titans", Dims(8, 0), {"eta": 1.0}, BUDGET)
    with pytest.raises(InvalidSpec, match="thetta"):
        build("titans", Dims(8, 0), {"thetta": 1.0}, BUDGET)
    memory, state = bank(8, 5)
    with pytest.raises(InvalidTrace, match="width 5"):
        memory.write(state, unit(1, 2, 8), None, torch.zeros(1, 2, dtype=torch.int64))
