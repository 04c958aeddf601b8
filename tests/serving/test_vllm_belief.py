"""What a request learns of a bank, however vLLM cuts its rows: no vLLM."""

import itertools

import pytest
import torch

from raymem.lm.mixing import mixture
from raymem.lm.trust import Trust, log_gains
from raymem.serving.vllm.memory import Belief

ROWS, VOCABULARY, CANDIDATES = 23, 61, 5


@pytest.fixture
def text():
    """A model's logits, those with memory, and the tokens: the rows' own, and the one after the last."""
    own = torch.randn(ROWS, VOCABULARY) * 2
    candidates = torch.stack([torch.randperm(VOCABULARY)[:CANDIDATES] for _ in range(ROWS)])
    shares = torch.rand(ROWS, 1, CANDIDATES)
    weights = torch.tensor([0.7, 0.3]).log().expand(ROWS, 2)
    mixed = mixture(torch.log_softmax(own, 1), candidates, shares / shares.sum(2, keepdim=True), weights)
    # as likely from one as from the other, so that the odds stay open
    following = torch.multinomial(own.softmax(1) + mixed.exp(), 1)[:, 0]
    return own, mixed, [3, *following.tolist()]


def piece(belief, text, start, stop, *, next_known=False, tokens=None):
    own, mixed, known = text
    tokens = known[start : stop + next_known] if tokens is None else tokens
    return belief.logits(own[start:stop], mixed[start:stop], start, tokens)


def expected(text):
    own, mixed, tokens = text
    return Trust().logits(own, mixed, torch.tensor(tokens[1:]))


def test_rows_one_by_one_and_in_pieces_are_weighed_as_in_one(text):
    whole = expected(text)
    for cuts, next_known in (
        ([0, ROWS], True),
        ([0, ROWS], False),
        ([0, 1, 7, 8, ROWS], False),
        (range(ROWS + 1), False),
    ):
        belief, cuts = Belief(CANDIDATES), list(cuts)
        pieces = [piece(belief, text, *pair, next_known=next_known) for pair in itertools.pairwise(cuts)]
        found = torch.cat(pieces)
        # odds that were summed in other groups
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_a_rejected_draft_leaves_nothing_behind(text):
    belief, whole = Belief(CANDIDATES), expected(text)
    piece(belief, text, 0, 9)
    gains = log_gains(text[0][9:10], text[1][9:10])[0]
    # one for which the bank has another gain than for the token that came
    wrong = int(gains.argmin() if gains[text[2][10]] > 0 else gains.argmax())
    drafted = piece(belief, text, 9, 11, tokens=[text[2][9], wrong])
    torch.testing.assert_close(drafted[0], whole[9], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drafted[1], whole[10], atol=1e-5)
    again = piece(belief, text, 10, 12)
    torch.testing.assert_close(again, whole[10:12], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(piece(belief, text, 12, 14), whole[12:14], atol=1e-5, rtol=1e-5)


def test_a_prompt_that_is_scored_in_chunks_is_not_disturbed_by_the_rows_sampled_between(text):
    belief, whole, found = Belief(CANDIDATES), expected(text), []
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        # vLLM samples from a chunk's last row before it scores the chunk
        piece(belief, text, stop - 1, stop)
        found.append(piece(belief, text, start, stop - (stop == 20), next_known=True))
    torch.testing.assert_close(torch.cat(found), whole[:19], atol=1e-5, rtol=1e-5)
    # and what it decodes goes on from there
    torch.testing.assert_close(piece(belief, text, 20, 21), whole[20:21], atol=1e-5, rtol=1e-5)


def test_tokens_that_a_model_rules_out_say_nothing(text):
    own, mixed, tokens = text
    never = next(token for token in range(VOCABULARY) if token not in tokens)
    own[:, never] = mixed[:, never] = float("-inf")
    belief = Belief(CANDIDATES)
    found = torch.cat([piece(belief, text, row, row + 1) for row in range(ROWS)])
    assert (found[:, never] == float("-inf")).all()
    torch.testing.assert_close(found, expected(text), atol=1e-5, rtol=1e-5)


def test_a_belief_stays_small(text):
    belief = Belief(CANDIDATES)
    for row in range(ROWS):
        piece(belief, text, row, row + 1)
    assert len(belief._odds) == 8 >= len(belief._gains)
    assert all(len(tokens) == CANDIDATES for tokens, _, _ in belief._gains.values())


def test_rows_that_memory_left_alone_keep_their_bits(text):
    own, _, tokens = text
    assert torch.equal(Belief(CANDIDATES).logits(own, own, 0, tokens[:ROWS]), own)
