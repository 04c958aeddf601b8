"""Memory's share in a prediction: identities that hold whatever the gate's weights are."""

import math
from dataclasses import replace

import pytest
import torch

from raymem import Readout
from raymem.errors import Corrupt, InvalidInput
from raymem.lm.gate import FEATURES, Gate, Prediction, combined_kinds, features, shares, shipped_gates, taus_of, votes
from raymem.lm.mixing import Evidence, Mixer, mixture, select
from raymem.memory import kinds
from raymem.memory.learned import Learned

VOCABULARY = 97


def readout(tokens, scores, relevance=None, *, kind="spalm"):
    tokens = torch.tensor(tokens)
    place = torch.zeros_like(tokens) if kind == "spalm" else None
    return Readout(
        values_QV=torch.zeros(len(tokens), 0),
        relevance_Q=torch.ones(len(tokens)) if relevance is None else torch.tensor(relevance),
        tokens_Qk=tokens,
        scores_Qk=torch.tensor(scores),
        pos_Qk=place,
        seq_Qk=place,
        source_Qk=place,
        kind=kind,
    )


def logits(rows):
    return torch.randn(rows, VOCABULARY) * 3


def mixed(own, tokens, shares, log_weights):
    """Log-probabilities of a mixture."""
    return mixture(Prediction(own), Evidence(tokens, shares, torch.zeros(len(own), 0)), log_weights).logits(own)


def fixed_gate(log_odds, kinds=("spalm",)):
    """A gate whose weights don't depend on the features."""
    zeros, taus = torch.zeros(FEATURES * len(kinds)), tuple(tau for kind in kinds for tau in taus_of(kind))
    return Gate(kinds, taus, zeros, zeros + 1, torch.zeros(1 + len(taus), len(zeros)), torch.tensor(log_odds))


def mixer(log_odds):
    return Mixer({"spalm": fixed_gate(log_odds)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spalm", "titans"])
def test_a_strict_mixer_leaves_what_is_not_relevant_bit_for_bit(dtype, kind):
    own = logits(3).to(dtype)
    silent = readout([[5, 6]] * 3, [[0.9, 0.8]] * 3, [0.0, 0.0, 0.0], kind=kind)
    assert Mixer(strict=True).logits(own, silent) is own
    some = readout([[5, 6]] * 3, [[0.9, 0.8]] * 3, [0.0, 1.0, 0.0], kind=kind)
    mixed = Mixer(strict=True).logits(own, some)
    assert torch.equal(mixed[[0, 2]], own[[0, 2]].float())
    assert not torch.equal(mixed[1], own[1].float())


def test_an_empty_bank_and_one_without_tokens_change_nothing():
    own = logits(2)
    empty = readout([[-1, -1]] * 2, [[-math.inf, -math.inf]] * 2)
    assert Mixer().logits(own, empty) is own
    vectors_only = Readout(values_QV=torch.ones(2, 4), relevance_Q=torch.ones(2))
    assert Mixer().logits(own, vectors_only) is own


def test_queries_without_candidates_keep_their_bits_beside_those_with_some():
    own, nothing = logits(3), [-math.inf, -math.inf]
    mixed = Mixer().logits(own, readout([[-1, -1], [5, 6], [-1, -1]], [nothing, [0.9, 0.8], nothing]))
    assert torch.equal(mixed[[0, 2]], own[[0, 2]])
    assert not torch.equal(mixed[1], own[1])


@pytest.mark.parametrize("kind", ["spalm", "titans"])
def test_the_mixture_is_a_distribution(kind):
    scores = torch.randn(7, 33).sort(descending=True).values * (0.1 if kind == "spalm" else 2.0)
    tokens = torch.randint(0, VOCABULARY, (7, 33))
    mixed = Mixer().logits(logits(7), readout(tokens.tolist(), scores.tolist(), kind=kind))
    # float32 sums over 97 tokens
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(7), atol=1e-5, rtol=0)


def test_all_weight_on_one_neighbour_is_its_token():
    sure = mixer([-1e4, 0.0, 0.0, 0.0, 0.0])
    mixed = sure.logits(logits(1), readout([[41]], [[0.97]]))
    assert float(mixed[0, 41]) == pytest.approx(0.0, abs=1e-6)
    assert float(mixed[0].exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_all_weight_on_the_model_leaves_its_distribution():
    own = logits(2)
    mixed = mixer([0.0, -1e4, -1e4, -1e4, -1e4]).logits(own, readout([[41, 7]] * 2, [[0.9, 0.9]] * 2))
    torch.testing.assert_close(mixed, torch.log_softmax(own, 1), atol=1e-6, rtol=0)


def test_a_pair_stored_n_times_has_n_times_the_mass():
    tokens, scores = torch.tensor([[3, 3, 3, 8]]), torch.full((1, 4), 0.7)
    found = mixed(torch.zeros(1, VOCABULARY), tokens, shares(scores, (0.05,)), torch.tensor([[-math.inf, 0.0]])).exp()
    assert float(found[0, 3]) == pytest.approx(0.75, abs=1e-6)
    assert float(found[0, 8]) == pytest.approx(0.25, abs=1e-6)


def test_the_mixture_is_kNN_LMs_formula():
    own = torch.log_softmax(logits(2), 1)
    tokens, scores, tau, weight = torch.tensor([[4, 9, 4], [1, 2, 3]]), torch.tensor([[0.9, 0.6, 0.5]] * 2), 0.2, 0.3
    expected = (1 - weight) * own.exp()
    for row in range(2):
        total = sum(math.exp(score / tau) for score in scores[row].tolist())
        for token, score in zip(tokens[row].tolist(), scores[row].tolist(), strict=True):
            expected[row, token] += weight * math.exp(score / tau) / total
    log_weights = torch.tensor([[1 - weight, weight]]).log().expand(2, 2)
    found = mixed(own, tokens, shares(scores, (tau,)), log_weights)
    torch.testing.assert_close(found.exp(), expected, atol=1e-6, rtol=1e-5)


def test_absent_candidates_count_for_nothing():
    with_absent = readout([[5, 6, -1, -1]], [[0.9, 0.8, -math.inf, -math.inf]])
    without = readout([[5, 6]], [[0.9, 0.8]])
    own = logits(1)
    torch.testing.assert_close(Mixer().logits(own, with_absent), Mixer().logits(own, without))


def test_a_nearer_memory_is_believed_more():
    own = logits(1)
    alone = float(torch.log_softmax(own, 1)[0, 5])
    gains = []
    for nearest in (0.70, 0.85, 0.99):
        scores = [[nearest, nearest - 0.3, nearest - 0.3]]
        found = Mixer().logits(own, readout([[5, 6, 7]], scores, [(nearest - 0.68) / 0.32]))
        gains.append(float(found[0, 5]) - alone)
    assert gains == sorted(gains)
    assert gains[-1] > gains[0] + 0.1


def test_features_stay_finite_at_the_extremes():
    sure = torch.full((1, VOCABULARY), -1e4)
    sure[0, 3] = 0.0
    for answer in (readout([[9]], [[1.0]]), readout([[9, -1]], [[-50.0, -math.inf]], kind="titans")):
        taus = taus_of("spalm")
        found = features(Prediction(sure), answer, taus)
        assert found.shape == (1, FEATURES)
        assert bool(torch.isfinite(found).all())
        assert bool(torch.isfinite(Mixer().logits(sure, answer).exp()).all())


def test_votes_add_up_by_token():
    found = votes(torch.tensor([[2, 5, 2]]), torch.tensor([[[0.5, 0.25, 0.125], [1.0, 2.0, 4.0]]]))
    assert found.tolist() == [[[0.625, 0.25, 0.625], [5.0, 2.0, 5.0]]]


def test_a_token_that_the_model_rules_out_spoils_no_row():
    own = logits(2)
    own[:, [3, 41]] = -math.inf
    found = Mixer().logits(own, readout([[41, 5]] * 2, [[0.9, 0.8]] * 2))
    assert bool((found[:, 3] == -math.inf).all())
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2), atol=1e-5, rtol=0)


def test_a_candidate_that_the_model_rules_out_says_nothing_of_the_memory():
    own = logits(1)
    own[:, [3, 41]] = -math.inf
    found = Mixer().mix(own, readout([[41, 5]], [[0.9, 0.8]]))
    assert found.gains()[0, 0] == 0
    assert float(found.gains_of(torch.tensor([41]))[0]) == 0
    # one that is no candidate loses what all others lose
    assert found.gains_of(torch.tensor([7])) == found.rest_Q


def test_a_batch_is_mixed_as_its_rows_are():
    own, answer = (
        logits(5),
        readout(torch.randint(0, VOCABULARY, (5, 9)).tolist(), torch.rand(5, 9).sort(descending=True).values.tolist()),
    )
    together = Mixer().logits(own, answer)
    for row in range(5):
        alone = Mixer().logits(own[row : row + 1], select(answer, torch.tensor([row])))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def pair_mixer(log_odds):
    return Mixer({"spalm+titans": fixed_gate(log_odds, ("spalm", "titans"))})


def test_several_memories_behind_one_gate_are_a_distribution_with_each_in_its_share():
    sure_of = {"first": [-1e4, 0, 0, 0, 0, -1e4, -1e4, -1e4, -1e4], "second": [-1e4, *[-1e4] * 4, 0, 0, 0, 0]}
    answers = [readout([[5, -1]], [[0.9, -math.inf]]), readout([[8]], [[-0.1]], kind="titans")]
    for which, token in (("first", 5), ("second", 8)):
        mixed = pair_mixer([float(odds) for odds in sure_of[which]]).logits(logits(1), answers)
        assert float(mixed[0, token]) == pytest.approx(0.0, abs=1e-6)
    mixed = pair_mixer([0.0] * 9).logits(logits(1), answers)
    assert float(mixed.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_memory_that_has_nothing_to_say_weighs_nothing_beside_one_that_has():
    own, speaks = logits(2), readout([[5, 6], [5, 6]], [[0.9, 0.8]] * 2)
    # without features, what is left is the model and four equal experts
    alone = mixer([0.0] * 5).logits(own, speaks)
    nothing = readout([[-1, -1]] * 2, [[-math.inf] * 2] * 2, kind="titans")
    vectors_only = Readout(values_QV=torch.ones(2, 4), relevance_Q=torch.ones(2), kind="titans")
    for silent in (nothing, vectors_only):
        torch.testing.assert_close(pair_mixer([0.0] * 9).logits(own, [speaks, silent]), alone)
        assert pair_mixer([0.0] * 9).logits(own, [replace(nothing, kind="spalm"), silent]) is own


def test_kinds_without_a_gate_are_refused_with_those_that_have_one():
    with pytest.raises(InvalidInput, match=r"'titans'.*spalm"):
        mixer([0.0] * 5).logits(logits(1), readout([[5]], [[-0.1]], kind="titans"))


def test_every_kind_and_the_combined_bank_have_a_shipped_gate():
    assert set(kinds()) <= set(shipped_gates())
    assert len(combined_kinds()) > 1


def test_another_number_of_queries_is_refused():
    with pytest.raises(InvalidInput, match="3 rows of logits and a readout of 1"):
        Mixer().logits(logits(3), readout([[5]], [[0.9]]))


def test_a_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(InvalidInput, match=f"token {VOCABULARY + 2}"):
        Mixer().logits(logits(1), readout([[VOCABULARY + 2]], [[0.9]]))


def test_a_gate_is_its_json():
    for gate in shipped_gates().values():
        again = Gate.from_json(gate.to_json())
        assert again.taus == gate.taus
        assert torch.equal(again.weight_GF, gate.weight_GF)


@pytest.mark.parametrize("part", ["taus", "mean_F", "weight_GF"])
def test_a_damaged_gate_is_refused(part):
    data = shipped_gates()["spalm"].to_json()
    with pytest.raises(Corrupt, match=r"raymem\.lm\.tune"):
        Gate.from_json({name: value for name, value in data.items() if name != part})
    with pytest.raises(Corrupt):
        Gate.from_json(data | {part: data[part][:-1]})


def test_a_learned_gate_is_the_same_gate_again():
    gate = shipped_gates()["spalm"]
    again = Gate.of_learned(Learned("spalm", gate.to_tensors()))
    assert (again.kinds, again.taus) == (gate.kinds, gate.taus)
    assert torch.equal(again.weight_GF, gate.weight_GF)
