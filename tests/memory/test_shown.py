"""Which rows each kind shows to attention: positions of the rows that it still has, by its own policy."""

import pytest
import torch
from torch.nn.functional import normalize

from raymem.errors import Unsupported
from raymem.memory import build
from raymem.memory.base import Dims, EncodedRows, Shown

WIDTH = 16
# as a journal's positions: rows of a run's start and end have no number, erased ones are gone
GAP = 3


def given(count: int, seed: int = 0, keys_NK: torch.Tensor | None = None) -> EncodedRows:
    if keys_NK is None:
        keys_NK = normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)
    number_N = torch.arange(count)
    # a row's token tells which row it is
    return EncodedRows(keys_NK, number_N + 100, None, GAP + 2 * number_N, number_N, torch.zeros_like(number_N))


def part(rows: EncodedRows, start: int, stop: int) -> EncodedRows:
    which = slice(start, stop)
    origin = (rows.pos_N[which], rows.seq_N[which], rows.source_N[which])
    return EncodedRows(rows.keys_NK[which], rows.tokens_N[which], None, *origin)


def bank(kind: str, rows: EncodedRows, budget: int = 2**20, **options: object):
    memory = build(kind, Dims(WIDTH, 0), options, budget).requires_grad_(False)
    state = memory.empty()
    for start in range(0, len(rows), 37):
        state = memory.absorb(state, part(rows, start, start + 37))
    return memory, state, memory.shown(state, rows.pos_N)


def numbers(pos_N: torch.Tensor) -> list[int]:
    return ((pos_N - GAP) // 2).tolist()


@pytest.mark.parametrize("count", [0, 1, 20, 100, 321])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("ntm", {}), ("dnc", {}), ("dnc", {"eviction": "lru"}), ("lemn", {}), ("lemn", {"policy": "reservoir"})],
)
def test_slots_show_the_rows_that_they_hold(kind, options, count):
    rows = given(count)
    _, state, shown = bank(kind, rows, slots=50, **options)
    held = sorted(state["token"][0][state["token"][0] >= 0].tolist())
    assert [number + 100 for number in numbers(shown.fine_N)] == held
    assert len(held) == min(count, 50)
    assert not len(shown.coarse_M)


def test_a_ring_shows_the_newest_rows_and_a_policy_others():
    rows = given(200)
    assert numbers(bank("ntm", rows, slots=50)[2].fine_N) == list(range(150, 200))
    kept = numbers(bank("lemn", rows, slots=50, policy="reservoir")[2].fine_N)
    assert min(kept) < 100 < max(kept)


@pytest.mark.parametrize("eviction", ["fifo", "lru", "uniform"])
@pytest.mark.parametrize("count", [1, 20, 200])
def test_links_lead_from_a_row_to_the_one_written_next(eviction, count):
    _, state, shown = bank("dnc", given(count), slots=50, eviction=eviction)
    assert shown.next_N is not None
    slot_of = {int(token) - 100: slot for slot, token in enumerate(state["token"][0].tolist()) if token >= 0}
    kept = numbers(shown.fine_N)
    for index, following in enumerate(shown.next_N.tolist()):
        links = [kept.index(n) for n, slot in slot_of.items() if state["before"][0, slot] == slot_of[kept[index]]]
        assert links == ([] if following < 0 else [following])
    if eviction == "fifo":
        assert shown.next_N.tolist() == [*range(1, len(kept)), -1]


def test_spalm_shows_what_its_eviction_leaves_and_what_was_not_forgotten():
    rows = given(300)
    memory, state, shown = bank("spalm", rows, budget=40 * 100)
    assert numbers(shown.fine_N) == list(range(300 - memory.capacity, 300))
    state = memory.forget(state, rows.pos_N[290:295])
    assert numbers(memory.shown(state, rows.pos_N).fine_N)[-6:] == [289, 295, 296, 297, 298, 299]


@pytest.mark.parametrize("compressor", ["subsample", "mean", "most_used"])
def test_compressive_shows_fine_rows_and_all_rows_of_the_blocks_behind_coarse_ones(compressor):
    rows = given(500)
    options = {"fine": 60, "coarse": 50, "ratio": 4, "block": 8, "compressor": compressor}
    memory, state, shown = bank("compressive", rows, **options)
    # 500 rows: 55 whole blocks of 8 have left the 60 fine rows
    assert numbers(shown.fine_N) == list(range(440, 500))
    # 50 coarse rows are 25 blocks of two
    assert numbers(shown.coarse_M) == list(range(440 - 25 * 8, 440))
    assert shown.ratio == 4
    if compressor == "subsample":
        picked = [100 + number for number in numbers(shown.coarse_M)[3::4]]
        assert memory.in_order(state)[1]["token"][:, 0].tolist() == picked


def test_nothing_is_shown_of_what_a_compressive_bank_without_coarse_rows_forgot():
    shown = bank("compressive", given(200), fine=30, coarse=0)[2]
    assert len(shown.coarse_M) == 0
    assert numbers(shown.fine_N)[0] > 160


@pytest.mark.parametrize("eviction", ["fifo", "uniform"])
def test_dct_shows_the_blocks_that_its_policy_kept(eviction):
    # blocks of four rows; every second block is one that was there before
    new = normalize(torch.randn(60, 4, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
    new[1::2] = new[0]
    rows = given(240, keys_NK=new.reshape(-1, WIDTH))
    memory, state, shown = bank("dct", rows, fine=20, coarse=200, threshold=0.2, log=64, eviction=eviction)
    kept = [each.block for each in memory.decisions(state) if each.kept]
    assert numbers(shown.coarse_M) == [4 * block + row for block in kept for row in range(4)]
    assert 20 < len(kept) < 35
    # the same whether blocks came in one call or one by one
    whole = memory.absorb(memory.empty(), rows)
    assert all(torch.equal(whole[name], state[name]) for name in state)


def test_a_merged_bank_counts_its_rows_from_the_newest():
    memory, first, _ = bank("lemn", given(40), slots=50)
    second = bank("lemn", given(40, seed=1), slots=50)[1]
    union = memory.merge([first, second])
    # two rows of the same name are one in the journal: 70 of the 80 are there
    pos_N = torch.arange(70)
    shown = memory.shown(union, pos_N)
    assert set(shown.fine_N.tolist()) <= set(range(70))
    assert shown.fine_N[-1] == 69


@pytest.mark.parametrize("kind", ["titans", "larimar"])
def test_kinds_that_keep_no_rows_refuse_by_name(kind):
    memory = build(kind, Dims(WIDTH, 0), {}, 2**20)
    with pytest.raises(Unsupported, match=f"a {kind} bank keeps no rows.*bank.read"):
        memory.shown(memory.empty(), torch.arange(0))


def test_positions_are_ascending_int64_on_every_kind():
    for kind in ("spalm", "ntm", "dnc", "lemn", "compressive", "dct"):
        shown: Shown = bank(kind, given(150))[2]
        for pos_N in (shown.fine_N, shown.coarse_M):
            assert pos_N.dtype == torch.int64
            assert bool((pos_N.diff() > 0).all())
