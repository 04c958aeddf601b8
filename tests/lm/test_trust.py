"""Trust in a bank: causal, a mixture, and never dear when misplaced."""

import math

import pytest
import torch

from raymem.lm.mixing import Mixture
from raymem.lm.trust import PRIOR, FixedShare, Trust


def rows(count=9, vocabulary=31):
    own, mixed = torch.randn(2, count, vocabulary) * 2
    return own, mixed, torch.randint(0, vocabulary, (count,))


def chosen(logits, tokens):
    return torch.log_softmax(logits, 1).gather(1, tokens[:, None])[:, 0]


def both(own, mixed):
    """Two predictions as a mixture in which every token is a candidate."""
    rows, nothing = torch.arange(len(own)), torch.zeros(len(own))
    candidates = torch.arange(own.shape[1]).expand(own.shape)
    return Mixture(rows, nothing, nothing, candidates, torch.log_softmax(own, 1), torch.log_softmax(mixed, 1))


def trusted(trust, own, mixed, tokens):
    found = both(own, mixed)
    return found.weighed(trust.observe(found.gains_of(tokens))).logits(own)


def test_what_is_yet_to_come_changes_nothing_before_it():
    own, mixed, tokens = rows()
    other = tokens.clone()
    other[5:] = (other[5:] + 1) % 31
    first, second = trusted(Trust(), own, mixed, tokens), trusted(Trust(), own, mixed, other)
    assert torch.equal(first[:6], second[:6])
    assert not torch.equal(first[6:], second[6:])


def test_cutting_a_context_into_calls_changes_nothing():
    own, mixed, tokens = rows()
    whole, trust = trusted(Trust(), own, mixed, tokens), Trust()
    parts = [trusted(trust, own[cut], mixed[cut], tokens[cut]) for cut in (slice(0, 1), slice(1, 6), slice(6, 9))]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("prior", [0.2, PRIOR, 0.99])
def test_a_memory_that_is_always_wrong_costs_a_bounded_amount_in_all(prior):
    own = torch.zeros(500, 31)
    mixed, tokens = own.clone(), torch.zeros(500, dtype=torch.int64)
    mixed[:, 0] = -3.0
    cost = float((chosen(own, tokens) - chosen(trusted(Trust(prior), own, mixed, tokens), tokens)).sum())
    # float32 log-probabilities of 500 rows
    assert 0 < cost <= -math.log(1 - prior) + 1e-3


def test_a_memory_that_is_right_is_soon_believed():
    own = torch.zeros(50, 31)
    mixed, tokens = own.clone(), torch.zeros(50, dtype=torch.int64)
    mixed[:, 0] = 2.0
    trust = Trust(0.5)
    found = trusted(trust, own, mixed, tokens)
    torch.testing.assert_close(found[-1], torch.log_softmax(mixed, 1)[-1], atol=1e-4, rtol=0)
    assert trust.log_odds > 20


def test_the_total_is_the_bayesian_mixture_of_both_predictions():
    own, mixed, tokens = rows()
    total = float(chosen(trusted(Trust(0.3), own, mixed, tokens), tokens).sum())
    expected = math.log(
        0.3 * math.exp(float(chosen(mixed, tokens).sum())) + 0.7 * math.exp(float(chosen(own, tokens).sum()))
    )
    assert total == pytest.approx(expected, abs=1e-4)


def test_where_both_predict_the_same_nothing_changes_whatever_the_odds():
    own, _, tokens = rows()
    torch.testing.assert_close(trusted(Trust(0.3), own, own, tokens), torch.log_softmax(own, 1))


def test_losses_are_those_of_the_logits():
    own, mixed, tokens = rows()
    expected = -chosen(trusted(Trust(), own, mixed, tokens), tokens)
    torch.testing.assert_close(Trust().losses(-chosen(own, tokens), -chosen(mixed, tokens)), expected)


def test_shared_weights_follow_the_better_predictor_when_it_changes():
    good, bad = torch.full((40,), 0.5), torch.full((40,), 3.0)
    changing = torch.stack([torch.cat([good, bad]), torch.cat([bad, good])])
    shared = FixedShare((0.5, 0.5), 0.05).losses(changing)
    fixed = FixedShare((0.5, 0.5), 0.0).losses(changing)
    assert shared[-30:].mean() < 0.6
    assert fixed[-30:].mean() > 2.0
    # without sharing it is Bayes' rule over two, as trust is
    torch.testing.assert_close(fixed, Trust(0.5).losses(changing[0], changing[1]), rtol=1e-4, atol=1e-4)


def test_shared_weights_lose_no_more_than_they_promise_and_know_no_later_token():
    made = torch.Generator().manual_seed(2)
    losses = torch.rand(4, 200, generator=made) * torch.tensor([[1.0], [30.0], [30.0], [30.0]])
    found = FixedShare((0.1, 0.1, 0.4, 0.4), 0.05).losses(losses)
    assert found.sum() - losses[0].sum() < -math.log(0.1) - 200 * math.log(0.95)
    parts = FixedShare((0.1, 0.1, 0.4, 0.4), 0.05)
    torch.testing.assert_close(torch.cat([parts.losses(losses[:, :77]), parts.losses(losses[:, 77:])]), found)
    changed = torch.cat([losses[:, :100], losses[:, 100:].flip(0)], 1)
    assert torch.equal(FixedShare((0.1, 0.1, 0.4, 0.4), 0.05).losses(changed)[:100], found[:100])
