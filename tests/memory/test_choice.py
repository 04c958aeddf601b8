"""Which rows a model attends to."""

import pytest
import torch
from torch.nn.functional import normalize

from raymem.errors import InvalidInput
from raymem.memory import choice
from raymem.memory.choice import Held, choose

WIDTH = 16


def held(rows, runs=1, states=True):
    made = torch.Generator().manual_seed(3)
    run = torch.arange(rows) * runs // rows
    unit = normalize(torch.randn(rows, WIDTH, generator=made), dim=1)
    return Held(unit if states else None, torch.arange(rows) % 50, run, torch.arange(rows) * 2 + 5)


def by_hand(bank, states, tokens, piece):
    """The two measures, piece by piece and token by token."""
    cuts, start = [], 0
    for place in range(1, len(bank.tokens_T) + 1):
        ends = place == len(bank.tokens_T) or bank.run_T[place] != bank.run_T[place - 1]
        if ends or place - start == piece:
            cuts.append(range(start, place))
            start = place
    best = torch.tensor([[max(float(q @ bank.states_TD[t]) for t in cut) for cut in cuts] for q in states])
    late = (best - best.mean(1, keepdim=True)).mean(0)
    texts = [[int(bank.tokens_T[t]) for t in cut] for cut in cuts]
    mean = sum(map(len, texts)) / len(texts)
    bm25 = torch.zeros(len(cuts))
    for token in tokens.tolist():
        having = sum(token in text for text in texts)
        weight = torch.tensor(1 + (len(texts) - having + 0.5) / (having + 0.5)).log()
        for place, text in enumerate(texts):
            times = text.count(token)
            bm25[place] += weight * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * len(text) / mean))
    return cuts, late, bm25


@pytest.mark.parametrize("method", ["states", "bm25", "fused"])
@pytest.mark.parametrize("runs", [1, 3])
def test_the_best_pieces_by_hand_are_chosen(method, runs):
    bank = held(100, runs)
    made = torch.Generator().manual_seed(4)
    states = normalize(torch.randn(5, WIDTH, generator=made), dim=1)
    tokens = torch.tensor([7, 7, 31, 49, 200])
    cuts, late, bm25 = by_hand(bank, states, tokens, 8)
    unit = {name: (score - score.mean()) / score.std(correction=0) for name, score in (("l", late), ("b", bm25))}
    scores = {"states": late, "bm25": bm25, "fused": unit["l"] + unit["b"]}[method]
    expected = set()
    for place in scores.argsort(descending=True).tolist():
        expected |= set(cuts[place])
        if len(expected | {0, 1}) >= 26:
            break
    found = choose(bank, states, tokens, 26, piece=8, sinks=2, method=method, floor=0.0)
    assert len(found.pos_N) == 26
    assert set(found.place_N.tolist()) <= expected | {0, 1}
    assert torch.equal(found.pos_N, found.place_N * 2 + 5)
    assert 0 <= found.relevance <= 1


@pytest.mark.parametrize("method", ["states", "bm25", "fused", "even", "recent"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 63, 99, 100, 101])
def test_rows_are_as_many_as_asked_in_order_and_begin_with_the_sinks(method, rows):
    bank = held(100, 2)
    found = choose(bank, bank.states_TD[40:50], bank.tokens_T[40:50], rows, method=method, floor=0.0)
    assert len(found.place_N) == min(rows, 100)
    assert (found.place_N.diff() > 0).all()
    assert found.place_N[: min(rows, 4)].tolist() == [0, 1, 2, 3][:rows]


def test_a_match_is_chosen_and_its_relevance_is_high():
    bank = held(1000)
    found = choose(bank, bank.states_TD[500:516], bank.tokens_T[500:516], 68)
    assert set(range(500, 512)) <= set(found.place_N.tolist())
    assert found.relevance > 0.99


def test_a_question_that_matches_worse_than_the_bank_itself_gets_nothing():
    made = torch.Generator().manual_seed(5)
    # a text of one subject: its states lie in a cone around two directions of many
    subject, other = torch.eye(64)[:2], torch.eye(64)[2:4]
    noise = torch.randn(400, 64, generator=made) / 8

    def about(directions, start, stop):
        return normalize(noise[start:stop] + directions[torch.arange(start, stop) % 2], dim=1)

    bank = held(300)._replace(states_TD=about(subject, 0, 300))
    tokens = torch.full((16,), 77)
    own = choose(bank, about(subject, 300, 316), tokens, 64)
    assert len(own.place_N) == 64
    assert own.relevance > 0.9
    wrong = choose(bank, about(other, 300, 316), tokens, 64)
    assert len(wrong.place_N) == len(wrong.pos_N) == 0
    assert wrong.relevance < 0.5
    assert len(choose(bank, about(other, 300, 316), tokens, 64, floor=0.0).place_N) == 64
    # of a bank of three pieces it can't be said
    small = Held(*(column[:96] for column in bank))
    assert len(choose(small, about(other, 300, 316), tokens, 64).place_N) == 64


def test_without_a_question_or_a_match_rows_are_spread_evenly():
    bank = held(1000)
    nothing = torch.zeros(0, dtype=torch.int64)
    asked = [
        choose(bank, None, nothing, 100),
        choose(bank, bank.states_TD[:0], nothing, 100),
        choose(bank._replace(states_TD=None), None, torch.tensor([77, 78]), 100),
        choose(bank, bank.states_TD[:4], bank.tokens_T[:4], 100, method="even"),
    ]
    for found in asked:
        gaps = found.place_N[4:].diff()
        assert 9 <= int(gaps.min()) <= int(gaps.max()) <= 12
        assert found.relevance == 0


@pytest.mark.parametrize("method", ["fused", "states", "bm25"])
def test_a_long_question_is_compared_in_blocks_with_the_same_result(method, monkeypatch):
    bank, sizes, spread = held(400), list[int](), choice._Pieces.spread
    generator = torch.Generator().manual_seed(3)
    states = normalize(torch.randn(90, bank.states_TD.shape[1], generator=generator), dim=-1)
    # no two pieces are alike: the order of sums may decide between those that are
    bank = bank._replace(tokens_T=torch.randint(0, 50, (400,), generator=generator))
    asked = (states, torch.randint(0, 50, (90,), generator=generator), 100)
    whole = choose(bank, *asked, method=method, floor=0.0)

    def watched(self, found_QT, empty):
        sizes.append(found_QT.numel())
        return spread(self, found_QT, empty)

    monkeypatch.setattr(choice._Pieces, "spread", watched)
    monkeypatch.setattr(choice, "_BLOCK", 4000)
    blocks = choose(bank, *asked, method=method, floor=0.0)
    assert torch.equal(blocks.place_N, whole.place_N)
    assert blocks.relevance == pytest.approx(whole.relevance, abs=1e-6)
    assert max(sizes) <= 4000


def test_recent_rows_are_the_sinks_and_the_last():
    assert choose(held(50), None, torch.tensor([1]), 10, method="recent").place_N.tolist() == [
        *range(4),
        *range(44, 50),
    ]


def test_tokens_choose_where_no_states_are_known():
    bank = held(200, states=False)._replace(tokens_T=torch.arange(200))
    found = choose(bank, normalize(torch.ones(2, WIDTH), dim=1), torch.tensor([130, 131]), 36)
    assert set(range(128, 160)) <= set(found.place_N.tolist())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"rows": 0}, "0 rows"),
        ({"piece": 0}, "pieces of 0"),
        ({"sinks": -1}, "-1 sinks"),
        ({"method": "best"}, "'best'"),
    ],
)
def test_bad_counts_and_methods_are_refused(more, why):
    with pytest.raises(InvalidInput, match=why):
        choose(held(9), None, torch.tensor([1]), **{"rows": 4} | more)


def test_states_of_another_width_are_refused():
    with pytest.raises(InvalidInput, match="16 wide"):
        choose(held(9), torch.zeros(2, 5), torch.tensor([1, 2]), 4)


def test_an_empty_bank_gives_nothing():
    found = choose(held(100)._replace(**{name: getattr(held(100), name)[:0] for name in Held._fields}), None,
                   torch.tensor([1]), 4)  # fmt: skip
    assert len(found.place_N) == 0
