"""The Dynamic Compressive Transformer's policies, their log, and what they are worth; mechanisms.md section 2."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from raymem.errors import InvalidSpec
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.compressive import Compressive, CompressiveOptions
from raymem.memory.dct import (
    Dct,
    DctOptions,
    KeepPolicy,
    budget_penalty,
    gated_attention,
    reinforce_loss,
    straight_through,
)

LARGE = 2**24
SIZES = {"fine": 8, "coarse": 6}


def bank(key: int, value: int = 0, **options) -> Dct:
    return Dct(Dims(key, value), DctOptions(**options), LARGE).requires_grad_(False)


def rows_of(keys: torch.Tensor, tokens: torch.Tensor | None = None, values: torch.Tensor | None = None) -> EncodedRows:
    numbers = torch.arange(len(keys))
    return EncodedRows(keys, numbers if tokens is None else tokens, values, numbers, numbers, 0 * numbers)


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("how", ["mean", "max", "subsample", "most_used", "conv", "dilated_conv"])
@pytest.mark.parametrize("count", [5, 61])
def test_j1_keeping_everything_is_bitwise_the_compressive_bank(how, count):
    options = SIZES | {"compressor": how, "block": 8}
    plain = Compressive(Dims(7, 0), CompressiveOptions(**options), LARGE).requires_grad_(False)
    rows = rows_of(drawn(count, 7))
    wanted = plain.dump(plain.absorb(plain.empty(), rows))
    memory = bank(7, policy="keep", **options)
    found = memory.dump(memory.absorb(memory.empty(), rows))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_j2_discarding_everything_leaves_the_coarse_memory_empty_and_the_fine_one_as_it_was():
    rows = rows_of(drawn(61, 7))
    kept, lost = bank(7, policy="keep", **SIZES), bank(7, policy="discard", **SIZES)
    wanted, found = (memory.absorb(memory.empty(), rows) for memory in (kept, lost))
    assert found["kept"].tolist() == [0]
    assert bool((found["cmem_token"] == -1).all())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if name.startswith("mem_"))


@pytest.mark.parametrize("how", ["mean", "subsample"])
@pytest.mark.parametrize("pieces", [4, 23, 400])
def test_j3_a_stream_of_two_blocks_over_and_over_keeps_two(how, pieces):
    blocks = torch.eye(6)[[0, 3]].repeat_interleave(4, 0)
    memory, state = bank(6, compressor=how, **SIZES), None
    for part in torch.split(blocks.repeat(50, 1), pieces):
        state = memory.absorb(memory.empty() if state is None else state, rows_of(part))
    assert state["kept"].tolist() == [2]
    assert state["seen"].tolist() == [98]


def test_j4_the_reinforce_gradient_is_that_of_the_expected_reward():
    logit = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    reward = {True: 3.0, False: -1.0}
    p = torch.sigmoid(logit).item()
    expected = 0.0
    for kept in (True, False):
        advantage = torch.tensor(reward[kept])
        loss = reinforce_loss(logit, torch.tensor(kept), advantage, entropy_weight=0.0)
        expected += (p if kept else 1 - p) * -torch.autograd.grad(loss, logit)[0].item()
    assert expected == pytest.approx(p * (1 - p) * (3.0 - -1.0), rel=1e-12)


def test_j4_gates_drawn_from_a_policy_are_open_as_often_as_it_says():
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    gates = straight_through(torch.full_like(noise, 0.4), noise)
    assert set(gates.tolist()) == {0.0, 1.0}
    # five standard deviations of a binomial rate
    assert abs(gates.mean().item() - torch.sigmoid(torch.tensor(0.4)).item()) < 5 * (0.25 / 20_000) ** 0.5


def test_an_untrained_policy_keeps_nine_in_ten_and_is_the_same_each_time():
    first, second = KeepPolicy(5), KeepPolicy(5)
    features = torch.randn(9, 13)
    assert torch.allclose(torch.sigmoid(first(features)), torch.full((9,), 0.9))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_closed_gate_hides_a_row_and_still_gets_a_gradient():
    gates = straight_through(torch.tensor([2.0, -3.0, 1.0], requires_grad=True), torch.full((3,), 0.5))
    gates.retain_grad()
    weights = gated_attention(torch.tensor([0.1, 5.0, 0.2]), gates)
    assert weights[1] == 0
    assert torch.allclose(weights[[0, 2]], torch.softmax(torch.tensor([0.1, 0.2]), 0))
    weights[1].backward()
    assert gates.grad[1] > 0


def test_the_budget_bounds_the_share_of_blocks_kept_at_every_moment():
    memory = bank(12, policy="keep", keep_rate=0.3, **SIZES)
    state, rows = memory.empty(), drawn(200, 12)
    for start in range(0, 200, 4):
        state = memory.absorb(state, rows_of(rows[start : start + 4]))
        kept, seen = int(state["kept"]), int(state["seen"])
        # never more than the first whole block above the rate
        assert kept <= 0.3 * seen + 1
    assert kept == pytest.approx(0.3 * seen, abs=1)
    assert budget_penalty(torch.zeros(4), 0.3).item() == pytest.approx(0.04)


def test_the_log_says_what_was_decided_and_why():
    # blocks: new, new, the first again
    blocks = torch.eye(6)[[0, 3, 0]].repeat_interleave(4, 0)
    memory = bank(6, log=3, **SIZES)
    state = memory.absorb(memory.empty(), rows_of(torch.cat([blocks, drawn(8, 6)])))
    lines = memory.decisions(state)
    assert [(line.block, line.kept) for line in lines] == [(0, True), (1, True), (2, False)]
    assert [round(line.novelty, 4) for line in lines] == [1.0, 1.0, 0.0]
    assert [round(line.fill, 4) for line in lines] == [0.0, round(1 / 6, 4), round(2 / 6, 4)]
    state = memory.absorb(state, rows_of(drawn(8, 6, 1)))
    assert [line.block for line in memory.decisions(state)] == [2, 3, 4]


def test_surprise_keeps_the_blocks_whose_vectors_are_long_and_then_needs_a_threshold():
    values = torch.ones(16, 5)
    values[4:8] = 3.0
    memory = bank(6, 5, policy="surprise", threshold=5.0, **SIZES)
    rows = rows_of(drawn(24, 6), values=torch.cat([values, torch.zeros(8, 5)]))
    state = memory.absorb(memory.empty(), rows)
    assert [line.kept for line in memory.decisions(state)] == [False, True, False, False]
    with pytest.raises(InvalidSpec, match="needs a threshold"):
        bank(6, 5, policy="surprise")


def test_without_vectors_surprise_is_what_the_memory_itself_says_of_the_tokens_that_came():
    memory = bank(6, policy="surprise", threshold=0.5, fine=2, coarse=8, ratio=2, compressor="mean", strength=40.0)
    keys = torch.eye(6).repeat_interleave(2, 0)
    # two blocks with tokens of their own; the first again; its keys with other tokens; two rows that stay fine
    at = [0, 1, 2, 3, 0, 1, 0, 1, 10, 11]
    state = memory.absorb(memory.empty(), rows_of(keys[at], torch.tensor([1, 1, 2, 2, 1, 1, 7, 7, 0, 0])))
    lines = memory.decisions(state)
    assert [line.kept for line in lines] == [True, True, False, True]
    assert [line.novelty for line in lines] == pytest.approx([1, 1, 0, 0], abs=1e-6)
    assert [line.surprise for line in lines] == pytest.approx([1, 1, 0, 1], abs=1e-3)


def test_own_surprise_is_minus_log_of_the_weight_on_rows_with_that_token():
    memory = bank(6, policy="surprise", threshold=0.0, fine=2, coarse=8, ratio=2, compressor="subsample", strength=2.0)
    keys, tokens = drawn(10, 6), torch.tensor([1, 2, 1, 3, 2, 3, 1, 2, 0, 0])
    state = memory.absorb(memory.empty(), rows_of(keys, tokens))
    held = keys[[1, 3, 5]]
    weights = torch.softmax(2 * keys[6:8] @ held.T, -1)
    # of rows 6 and 7, tokens 1 and 2, the first is unknown: a selected row stands for its own token alone
    p = 1e-4 + (1 - 1e-4) * torch.stack([0 * weights[0, 0], weights[1, 0]])
    assert memory.decisions(state)[3].surprise == pytest.approx((p.log().mean() / math.log(1e-4)).item(), rel=1e-5)


WIDTH, BLOCKS, ROOM, FACTS = 16, 24, 6, 4


def streams(count: int, seed: int, mark: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows `[N, BLOCKS, 4, WIDTH]`, and which blocks carry a marked fact."""
    generator = torch.Generator().manual_seed(seed)
    marked = torch.rand(count, BLOCKS, generator=generator).argsort(1) < FACTS
    means = torch.randn(count, BLOCKS, 1, WIDTH, generator=generator) + 4 * marked[..., None, None] * mark
    return normalize(means + 0.3 * torch.randn(count, BLOCKS, 4, WIDTH, generator=generator), dim=-1), marked


def inputs(rows: torch.Tensor) -> torch.Tensor:
    """What a policy sees of blocks; the numbers are drawn at random, so that it learns to look at the rows."""
    mean = normalize(rows.mean(2), dim=-1)
    return torch.cat([mean, rows[:, :, -1], torch.rand(*mean.shape[:2], 3)], -1)


def test_a_trained_policy_recalls_the_marked_facts_that_always_keeping_forgets(figure):
    torch.manual_seed(0)
    mark = normalize(torch.randn(WIDTH), dim=0)
    policy = KeepPolicy(WIDTH)
    optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(250):
        rows, marked = streams(128, step, mark)
        logits = policy(inputs(rows))
        kept = torch.rand_like(logits) < torch.sigmoid(logits)
        later = kept.flip(1).cumsum(1).flip(1) - kept.long()
        held = kept & (later < ROOM)
        # facts held at the end, less those that were pushed out or turned away; shared by all decisions of a stream
        reward = (held & marked).sum(1, keepdim=True) / FACTS - 0.02 * (kept & ~marked).sum(1, keepdim=True)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        optimiser.zero_grad()
        reinforce_loss(logits, kept, advantage.expand_as(logits)).backward()
        optimiser.step()
    recall = {}
    for name in ("learned", "keep"):
        memory = bank(WIDTH, policy=name, fine=4, coarse=ROOM)
        if memory.policy is not None:
            memory.policy.load_state_dict(policy.state_dict())
        found = []
        for rows, marked in zip(*streams(20, 10_000, mark), strict=True):
            stream = torch.cat([rows.flatten(0, 1), drawn(4, WIDTH)])
            tokens = torch.cat([torch.arange(BLOCKS).repeat_interleave(4), torch.full((4,), 99)])
            state = memory.absorb(memory.empty(), rows_of(stream, tokens))
            answer = memory.lookup(state, rows[marked].mean(1), 1).tokens_Qk[:, 0]
            found.append((answer == torch.arange(BLOCKS)[marked]).float().mean())
        recall[name] = torch.stack(found).mean().item()
    # blocks kept / blocks seen is the closed form for facts placed anywhere
    assert recall["keep"] == pytest.approx(ROOM / BLOCKS, abs=0.1)
    task = f"marked facts recalled, room for {ROOM} of {BLOCKS} blocks"
    figure("dct", task, recall["learned"], above=0.9, baseline={"always keep": recall["keep"]})
