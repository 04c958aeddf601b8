"""In what manner kinds show their rows: pieces for a question, slots, where their links lead, or always the same."""

import pytest
import torch
from torch.nn.functional import normalize

from raymem.errors import InvalidInput
from raymem.memory.base import Shown
from raymem.memory.choice import Held
from raymem.memory.showing import Asked, choose_shown

T, D = 200, 16
NONE = torch.zeros(0, dtype=torch.int64)


def held(count: int = T, run_T: torch.Tensor | None = None) -> Held:
    states_TD = normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    run_T = torch.zeros(count, dtype=torch.int64) if run_T is None else run_T
    return Held(states_TD, torch.arange(count) % 50, run_T, 1000 + 3 * torch.arange(count))


def asked(rows: int, places: list[int], method: str = "states") -> Asked:
    rows_held = held()
    return Asked(rows, rows_held.states_TD[places], rows_held.tokens_T[places], method)


def tape(links: dict[int, int]) -> Shown:
    next_N = torch.tensor([links.get(place, -1) for place in range(T)])
    return Shown(held().pos_T, NONE, next_N=next_N)


@pytest.mark.parametrize("kind", ["spalm", "lemn"])
def test_pieces_around_a_match_are_shown_together(kind):
    found = choose_shown(held(), asked(36, [100, 101]), kind)
    assert found.place_N.tolist() == [0, 1, 2, 3, *range(96, 128)]


def test_slots_that_match_are_shown_with_a_few_neighbours():
    assert choose_shown(held(), asked(12, [100]), "ntm").place_N.tolist() == [0, 1, 2, 3, *range(96, 104)]
    two = choose_shown(held(), asked(20, [100, 37]), "ntm").place_N.tolist()
    assert two == [0, 1, 2, 3, *range(32, 40), *range(96, 104)]


def test_a_match_is_followed_along_its_links():
    # the tape goes backwards from 100, and nowhere from 99
    links = {100: 60, 60: 61, 61: 20, 20: 21, 21: 22, 22: 99, 99: -1}
    found = choose_shown(held(), asked(12, [100]), "dnc", tape(links))
    assert found.place_N.tolist() == [0, 1, 2, 3, 20, 21, 22, 60, 61, 99, 100, *found.place_N.tolist()[11:]]
    assert len(found.place_N) == 12
    # in a ring without gaps a match is followed by the rows written next
    ring = choose_shown(held(), asked(12, [100]), "dnc", tape({place: place + 1 for place in range(T - 1)}))
    assert ring.place_N.tolist() == [0, 1, 2, 3, *range(100, 108)]


def test_links_that_end_leave_room_for_others():
    for links in ({}, {100: 101, 101: 100}):
        found = choose_shown(held(), asked(40, [100]), "dnc", tape(links))
        assert len(found.place_N.unique()) == len(found.place_N) == 40
        assert 100 in found.place_N.tolist()


@pytest.mark.parametrize("kind", ["compressive", "dct"])
def test_compressed_kinds_show_the_same_rows_whatever_the_question(kind):
    everything = held()
    shown = Shown(everything.pos_T[120:], everything.pos_T[:120], 4)
    one, other = (choose_shown(everything, asked(150, places), kind, shown) for places in ([100], [3, 9, 180]))
    assert torch.equal(one.place_N, other.place_N)
    # all fine rows, the sinks, and the last of every four coarse ones
    assert one.place_N.tolist() == [0, 1, 2, *range(3, 120, 4), *range(120, 200)]
    # what a request makes of relevance is its own
    assert one.relevance > 0.99
    few = choose_shown(everything, asked(40, [100]), kind, shown)
    assert len(few.place_N) == 40
    assert few.place_N[:4].tolist() == [0, 1, 2, 3]
    assert int(few.place_N.diff().amax()) <= 6
    assert few.place_N[-1] == T - 1


def test_sinks_are_shown_though_they_are_coarse():
    everything = held()
    shown = Shown(everything.pos_T[150:], everything.pos_T[:150], 50)
    assert choose_shown(everything, asked(100, [9]), "compressive", shown).place_N[:5].tolist() == [0, 1, 2, 3, 49]


@pytest.mark.parametrize("kind", ["spalm", "ntm", "dnc", "lemn", "compressive", "dct"])
@pytest.mark.parametrize("rows", [1, 4, 5, 63, 100, 200, 500])
def test_as_many_rows_as_asked_for_or_all_that_there_are(kind, rows):
    shown = tape({place: place + 1 for place in range(T - 1)})
    for method in ("fused", "even", "recent"):
        found = choose_shown(held(), asked(rows, [77, 78], method), kind, shown)
        assert len(found.place_N) == min(rows, T)
        assert bool((found.place_N.diff() > 0).all())
        assert torch.equal(found.pos_N, held().pos_T[found.place_N])


@pytest.mark.parametrize("kind", ["spalm", "ntm", "dnc", "compressive"])
def test_a_bank_without_rows_shows_none(kind):
    empty = held(0)
    found = choose_shown(empty, Asked(8, None, NONE), kind, Shown(NONE, NONE, 4, NONE if kind == "dnc" else None))
    assert len(found.place_N) == 0


def test_wrong_wishes_are_refused_by_every_kind():
    for kind in ("spalm", "ntm", "dnc", "compressive"):
        with pytest.raises(InvalidInput, match="'best'"):
            choose_shown(held(), asked(8, [3], "best"), kind)
        with pytest.raises(InvalidInput, match="0 rows"):
            choose_shown(held(), asked(0, [3]), kind)


@pytest.mark.parametrize("kind", ["spalm", "ntm", "dnc", "compressive"])
def test_no_kind_shows_a_bank_that_has_nothing_to_do_with_the_question(kind):
    # the bank's own rows say the same thing all over; the question something else
    about = normalize(torch.tensor([1.0] * 8 + [0.0] * 8), dim=0)
    states_TD = normalize(about + 0.1 * held().states_TD, dim=-1)
    other = normalize(1 - about, dim=0).expand(4, -1)
    bank = held()._replace(states_TD=states_TD)
    shown = tape({place: place + 1 for place in range(T - 1)})
    found = choose_shown(bank, Asked(40, other, NONE, "states"), kind, shown)
    assert found.relevance < 0.7
    assert len(found.place_N) == 0
    assert len(choose_shown(bank, Asked(40, states_TD[90:94], NONE, "states"), kind, shown).place_N) == 40
