"""What a request learns of a bank, however vLLM cuts its rows: no vLLM."""

import itertools
from dataclasses import replace

import pytest
import torch

from raymem.lm.gate import Prediction
from raymem.lm.mixing import Evidence, Mixture, mixture
from raymem.lm.trust import Trust
from raymem.serving.vllm.memory import Belief

ROWS, VOCABULARY, CANDIDATES = 23, 61, 5


@pytest.fixture
def text():
    """A model's logits, what memory makes of them, and the tokens: the rows' own, and the one after the last."""
    return written(torch.randn(ROWS, VOCABULARY) * 2)


def written(own):
    tokens = torch.stack([torch.randperm(VOCABULARY)[:CANDIDATES] for _ in range(ROWS)])
    shares = torch.rand(ROWS, 1, CANDIDATES)
    found = Evidence(tokens, shares / shares.sum(2, keepdim=True), torch.zeros(ROWS, 0))
    mixed = mixture(Prediction(own), found, torch.tensor([0.7, 0.3]).log().expand(ROWS, 2))
    # as likely from one as from the other, so that the odds stay open
    following = torch.multinomial(own.softmax(1) + mixed.logits(own).exp(), 1)[:, 0]
    return own, mixed, [3, *following.tolist()]


def piece(belief, text, start, stop, *, next_known=False, tokens=None):
    own, mixed, known = text
    tokens = known[start : stop + next_known] if tokens is None else tokens
    rows, found = torch.arange(stop - start), mixed.of(slice(start, stop))
    weighed = found.weighed(belief.odds(found, rows, start, tokens, len(rows)))
    return replace(weighed, rows_Q=rows).logits(own[start:stop])


def expected(text):
    own, mixed, tokens = text
    gains = mixed.gains_of(torch.tensor(tokens[1:]))
    return mixed.weighed(Trust().observe(gains)).logits(own)


def test_rows_one_by_one_and_in_pieces_are_weighed_as_in_one(text):
    whole = expected(text)
    for cuts, next_known in (
        ([0, ROWS], True),
        ([0, ROWS], False),
        ([0, 1, 7, 8, ROWS], False),
        (range(ROWS + 1), False),
    ):
        belief, cuts = Belief(), list(cuts)
        pieces = [piece(belief, text, *pair, next_known=next_known) for pair in itertools.pairwise(cuts)]
        found = torch.cat(pieces)
        # odds that were summed in other groups
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_a_rejected_draft_leaves_nothing_behind(text):
    belief, whole = Belief(), expected(text)
    piece(belief, text, 0, 9)
    gains = (text[1].logits(text[0]) - text[0].log_softmax(1))[9]
    # one for which the bank has another gain than for the token that came
    wrong = int(gains.argmin() if gains[text[2][10]] > 0 else gains.argmax())
    drafted = piece(belief, text, 9, 11, tokens=[text[2][9], wrong])
    torch.testing.assert_close(drafted[0], whole[9], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drafted[1], whole[10], atol=1e-5)
    again = piece(belief, text, 10, 12)
    torch.testing.assert_close(again, whole[10:12], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(piece(belief, text, 12, 14), whole[12:14], atol=1e-5, rtol=1e-5)


def test_a_prompt_that_is_scored_in_chunks_is_not_disturbed_by_the_rows_sampled_between(text):
    belief, whole, found = Belief(), expected(text), []
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        # vLLM samples from a chunk's last row before it scores the chunk
        piece(belief, text, stop - 1, stop)
        found.append(piece(belief, text, start, stop - (stop == 20), next_known=True))
    torch.testing.assert_close(torch.cat(found), whole[:19], atol=1e-5, rtol=1e-5)
    # and what it decodes goes on from there
    torch.testing.assert_close(piece(belief, text, 20, 21), whole[20:21], atol=1e-5, rtol=1e-5)


def test_tokens_that_a_model_rules_out_say_nothing(text):
    own, _, tokens = text
    never = next(token for token in range(VOCABULARY) if token not in tokens and not (text[1].tokens_Qk == token).any())
    own[:, never] = float("-inf")
    text = own, text[1], tokens
    belief = Belief()
    found = torch.cat([piece(belief, text, row, row + 1) for row in range(ROWS)])
    assert (found[:, never] == float("-inf")).all()
    torch.testing.assert_close(found, expected(text), atol=1e-5, rtol=1e-5)


def test_a_belief_stays_small(text):
    belief = Belief()
    for row in range(ROWS):
        piece(belief, text, row, row + 1)
    assert len(belief._odds) == 8 >= len(belief._gains)
    assert all(len(gains) <= CANDIDATES for gains, _ in belief._gains.values())


def test_rows_that_memory_did_not_answer_say_nothing_about_it(text):
    own, mixed, tokens = text
    some = torch.tensor([0, 1, 4, 7])
    found = Mixture(*(column[some] for column in vars(mixed).values()))
    odds = Belief().odds(found, some, 0, tokens[:8], 8)
    gains = torch.zeros(8)
    gains[[0, 1, 4]] = mixed.gains_of(torch.tensor(tokens[1:]))[[0, 1, 4]]
    torch.testing.assert_close(odds, Trust().observe(gains)[some])
    left = found.weighed(odds).logits(own[:8])
    assert torch.equal(left[[2, 3, 5, 6]], own[[2, 3, 5, 6]])
