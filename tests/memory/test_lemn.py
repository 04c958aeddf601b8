"""LEMN's slots under each policy, and an agent that learns what to keep; mechanisms.md section 5."""

import time

import pytest
import torch
from torch.nn.functional import normalize

from raymem.errors import InvalidSpec, InvalidTrace
from raymem.memory import build
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.lemn import Lemn, LemnOptions

LARGE = 2**24


def bank(key: int, value: int = 0, **options) -> Lemn:
    return Lemn(Dims(key, value), LemnOptions(**options), LARGE).requires_grad_(False)


def rows_of(keys: torch.Tensor, tokens: torch.Tensor | None = None, values: torch.Tensor | None = None) -> EncodedRows:
    numbers = torch.arange(len(keys))
    return EncodedRows(keys, numbers if tokens is None else tokens, values, numbers, numbers, 0 * numbers)


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def held(memory: Lemn, count: int) -> list[int]:
    return sorted(memory.absorb(memory.empty(), rows_of(drawn(count, 8)))["arrival"][0].tolist())


def test_j1_fifo_holds_the_last_rows_and_lifo_the_first():
    assert held(bank(8, slots=5, policy="fifo"), 23) == list(range(18, 23))
    assert held(bank(8, slots=5, policy="lifo"), 23) == list(range(5))


@pytest.mark.parametrize("policy", ["fifo", "lifo", "uniform", "reservoir", "lru", "im", "s", "st"])
def test_cutting_the_stream_elsewhere_gives_the_same_bits_under_every_policy(policy):
    memory, keys = bank(8, slots=5, policy=policy), drawn(31, 8)
    whole = memory.absorb(memory.empty(), rows_of(keys))
    state = memory.empty()
    for start, end in ((0, 1), (1, 4), (4, 4), (4, 20), (20, 31)):
        part = rows_of(keys[start:end], torch.arange(start, end))
        state = memory.absorb(state, part)
    assert all(torch.equal(whole[name], state[name]) for name in whole)


def test_j2_uniform_eviction_outlives_k_decisions_as_often_as_it_should():
    slots, later, streams = 4, 6, 4000
    memory = bank(2, slots=slots, policy="uniform")
    start = memory.init_state(streams)
    # each bank has its own numbers, and so its own draws
    start["count"] += 1000 * torch.arange(streams)
    keys, tokens = drawn(1, 2).expand(streams, slots + later, 2), torch.arange(slots + later).expand(streams, -1)
    state = memory.write(start, keys, None, tokens)
    alive = (state["token"] == 1).any(1).float().mean().item()
    expected = (slots / (slots + 1)) ** later
    # five standard deviations
    assert abs(alive - expected) < 5 * (expected * (1 - expected) / streams) ** 0.5


def test_a_reservoir_holds_every_part_of_the_stream_alike():
    memory = bank(2, slots=200, policy="reservoir")
    state = memory.absorb(memory.empty(), rows_of(drawn(2000, 2)))
    quarters = torch.bincount(state["arrival"][0] // 500, minlength=4)
    # five standard deviations of 200 draws with chance 1/4
    assert bool(((quarters - 50).abs() < 5 * (200 * 0.25 * 0.75) ** 0.5).all())


def test_lru_keeps_what_the_stream_comes_back_to():
    keys = drawn(40, 32)
    # row 0 comes up again and again, between rows that never do
    stream = torch.stack([keys[0] if i % 3 == 0 else keys[i] for i in range(40)])
    tokens = torch.tensor([0 if i % 3 == 0 else i for i in range(40)])
    memory = bank(32, slots=6, policy="lru")
    state = memory.absorb(memory.empty(), rows_of(stream, tokens))
    assert 0 in state["token"][0].tolist()


def test_a_bank_answers_with_the_tokens_of_what_it_kept():
    memory, keys = bank(16, 3, slots=8, strength=40.0), drawn(30, 16)
    values = torch.randn(30, 3)
    state = memory.absorb(memory.empty(), rows_of(keys, values=values))
    kept = state["arrival"][0]
    found = memory.lookup(state, keys[kept], 20)
    assert torch.equal(found.tokens_Qk[:, 0], kept)
    assert torch.allclose(found.scores_Qk.exp().sum(1), torch.ones(8), atol=1e-5)
    blended = (found.scores_Qk[:, :8].exp()[..., None] * values[found.tokens_Qk[:, :8]]).sum(1)
    assert torch.allclose(found.values_QV, blended, atol=1e-5)


def test_gradients_reach_keys_and_values_that_were_kept():
    memory = Lemn(Dims(4, 2), LemnOptions(slots=3), LARGE)
    keys, values = (torch.randn(1, 7, n, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    empty = {n: t.double() if t.is_floating_point() else t for n, t in memory.init_state(1).items()}

    def blended(keys, values):
        written = memory.write(empty, keys, values, torch.arange(7)[None])
        return memory.read(written, drawn(2, 4)[None].double(), 1).values_BQV

    assert torch.autograd.gradcheck(blended, (keys, values))


def test_a_row_takes_less_than_a_millisecond():
    with torch.no_grad():
        memory = build("lemn", Dims(576, 0), {}, 2**28)
        state = memory.absorb(memory.empty(), rows_of(drawn(1100, 576)))
        keys = rows_of(drawn(500, 576, 1))
        started = time.process_time()
        memory.absorb(state, keys)
        # 0.4 ms a row alone. of this process: what else shares the cores doesn't count
        assert time.process_time() - started < 1.0


def test_too_small_a_budget_and_missing_vectors_are_refused():
    with pytest.raises(InvalidSpec, match=r"budget_bytes=1024 leaves a lemn bank \d+ slots .* needs 16, so \d+ bytes"):
        build("lemn", Dims(64, 0), {}, 1024)
    memory = bank(4, 3)
    with pytest.raises(InvalidTrace, match="width 3"):
        memory.absorb(memory.empty(), rows_of(drawn(2, 4)))
