"""Eviction policies and agents against their equations; mechanisms.md section 5."""

import pytest
import torch
from torch.nn.functional import normalize

from raymem.memory.policies import (
    Critic,
    Entries,
    InputMatching,
    Spatial,
    SpatioTemporal,
    advantages,
    policy,
)

N, K = 6, 8


def entries(seed: int = 0, banks: int = 3) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    keys = normalize(torch.randn(banks, N + 1, K, generator=generator), dim=-1)
    arrival = torch.stack([torch.randperm(40, generator=generator)[:N] for _ in range(banks)])
    return Entries(keys[:, :N], arrival, keys[:, N], torch.full((banks,), 40))


def made(name: str):
    return policy(name, K, strength=4.0, gamma=0.5, hidden=5)


def test_the_oldest_goes_first_and_the_newcomer_under_lifo():
    at = entries()
    assert torch.equal(made("fifo")({}, at)[0].argmax(1), at.arrival_BN.argmin(1))
    assert made("lifo")({}, at)[0].argmax(1).tolist() == [N] * 3


def test_numbers_beyond_float32_are_still_told_apart():
    at = entries()
    late = at._replace(arrival_BN=at.arrival_BN + 2**40, number_B=at.number_B + 2**40)
    assert torch.equal(made("fifo")({}, late)[0].argmax(1), at.arrival_BN.argmin(1))


def test_lru_evicts_what_was_not_nearest_to_a_newcomer_for_longest():
    at = entries(banks=1)
    near = at._replace(newcomer_BK=at.keys_BNK[:, 2])
    used = {"used": torch.tensor([[7, 9, 1, 3, 8, 5]])}
    logits, after = made("lru")(used, near)
    # slot 2 was the stalest, and is used by this very newcomer
    assert logits.argmax(1).tolist() == [3]
    assert after["used"].tolist() == [[7, 9, 40, 3, 8, 5, 40]]


def test_j3_without_gamma_the_most_similar_goes_and_the_average_follows_the_attention():
    at = entries()
    rule = InputMatching(K, 4.0, gamma=0.0)
    own = {"attended": torch.zeros(3, N)}
    z = torch.softmax(4 * (at.keys_BNK @ at.newcomer_BK[..., None])[..., 0], -1)
    for step in range(1, 5):
        logits, seen = rule(own, at)
        assert torch.equal(logits[:, :N].argmax(1), z.argmax(1))
        assert bool((logits[:, N] == float("-inf")).all())
        own = {"attended": seen["attended"][:, :N]}
        # float32 rounding
        assert torch.allclose(own["attended"], z * (1 - 0.1**step), atol=1e-6)
    protected = InputMatching(K, 4.0, gamma=100.0)(own, at)[0]
    assert torch.equal(protected[:, :N].argmax(1), z.argmin(1))


def test_a_learned_gamma_starts_in_the_middle_and_gets_a_gradient():
    rule = InputMatching(K, 4.0, gamma=None)
    own, at = {"attended": torch.rand(3, N)}, entries()
    assert torch.allclose(rule(own, at)[0][:, :N], InputMatching(K, 4.0, gamma=0.5)(own, at)[0][:, :N])
    rule(own, at)[0][:, 0].sum().backward()
    assert rule.protect.grad.any()


@pytest.mark.parametrize("kind", [Spatial, SpatioTemporal])
def test_agents_see_entries_in_the_order_of_arrival_wherever_they_are_kept(kind):
    agent, at, shuffle = kind(K, 5), entries(), torch.randperm(N)
    history = torch.randn(3, N, 5)
    own = {"history": history} if agent.spec() else {}
    logits, after = agent(own, at)
    moved = at._replace(keys_BNK=at.keys_BNK[:, shuffle], arrival_BN=at.arrival_BN[:, shuffle])
    other, moved_after = agent({name: tensor[:, shuffle] for name, tensor in own.items()}, moved)
    back = [*shuffle.tolist(), N]
    assert torch.allclose(logits[:, back], other, atol=1e-6)
    for name, tensor in after.items():
        assert torch.allclose(tensor[:, back], moved_after[name], atol=1e-6)


def test_j4_a_bigru_minds_the_order_so_that_the_state_must_keep_it():
    agent, at = Spatial(K, 5), entries()
    later = at._replace(arrival_BN=at.arrival_BN.flip(1))
    assert not torch.allclose(agent({}, at)[0], agent({}, later)[0], atol=1e-4)


def test_a_history_changes_what_an_agent_thinks_of_an_entry():
    agent, at = SpatioTemporal(K, 5), entries()
    none, some = (agent({"history": history}, at)[0] for history in (torch.zeros(3, N, 5), torch.randn(3, N, 5)))
    assert not torch.allclose(none[:, :N], some[:, :N], atol=1e-4)
    # the newcomer has none, whoever it meets
    assert torch.allclose(none[:, N], some[:, N])


def test_a_critic_does_not_mind_the_order_and_banks_do_not_mix():
    critic, encoded = Critic(10, 7), torch.randn(3, N, 10)
    value, hidden = critic(encoded)
    assert torch.allclose(value, critic(encoded.flip(1))[0], atol=1e-6)
    assert torch.allclose(value[1:2], critic(encoded[1:2])[0], atol=1e-6)
    assert not torch.allclose(critic(encoded, hidden)[0], value)


def test_j5_with_tau_one_an_advantage_is_the_discounted_return_minus_the_value():
    rewards, values = torch.randn(7, 3).double(), torch.randn(7, 3).double()
    found = advantages(rewards, values, discount=0.9)
    for t in range(7):
        returns = sum(0.9 ** (s - t) * rewards[s] for s in range(t, 7))
        assert torch.allclose(found[t], returns - values[t], atol=1e-12)
    errors = rewards[:-1] + 0.9 * values[1:] - values[:-1]
    assert torch.allclose(advantages(rewards, values, discount=0.9, tau=0.0)[:-1], errors)
