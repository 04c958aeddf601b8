"""Merging: each class states its rule and keeps to it; mechanisms.md section 0.5."""

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from raymem.errors import InvalidInput, InvalidSpec, Unsupported
from raymem.memory import build, kinds, merge_rule
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.merging import interleaved

RULES = {
    "compressive": "approximate",
    "dct": "approximate",
    "dnc": "refused",
    "larimar": "exact",
    "lemn": "approximate",
    "ntm": "refused",
    "spalm": "exact",
    "titans": "approximate",
}
LARGE = 2**22


def stream(count: int, seed: int, width: int = 16, value: int = 0, vocabulary: int = 12) -> EncodedRows:
    generator = torch.Generator().manual_seed(seed)
    keys = normalize(torch.randn(count, width, generator=generator), dim=1)
    values = torch.randn(count, value, generator=generator) if value else None
    tokens = torch.randint(vocabulary, (count,), generator=generator)
    numbers = torch.arange(count)
    return EncodedRows(keys, tokens, values, numbers, numbers, torch.zeros_like(numbers))


def taken(parts: list[EncodedRows], picks: list[tuple[int, int]]) -> EncodedRows:
    def column(name: str):
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else torch.stack([columns[part][row] for part, row in picks])

    names = ("keys_NK", "tokens_N", "values_NV")
    return EncodedRows(*(column(name) for name in names), *(3 * [torch.arange(len(picks))]))


def one_journal(parts: list[EncodedRows]) -> EncodedRows:
    """All rows by age, written out plainly: the newest of each bank last, earlier banks first."""
    aged = [(len(part) - row, which, row) for which, part in enumerate(parts) for row in range(len(part))]
    return taken(parts, [(which, row) for _, which, row in sorted(aged, key=lambda at: (-at[0], at[1]))])


def written(memory, rows: EncodedRows):
    return memory.absorb(memory.empty(), rows)


def make(kind: str, value: int = 0, budget: int = LARGE, **options):
    return build(kind, Dims(16, value), options, budget).requires_grad_(False)


def same(memory, a, b, skip: tuple[str, ...] = ("scope_keys", "scope_scale")) -> None:
    a, b = memory.dump(a), memory.dump(b)
    assert a.keys() == b.keys()
    for name in a.keys() - set(skip):
        assert torch.equal(a[name], b[name]), name


def test_every_kind_states_its_rule_and_a_caller_needs_no_bank_to_ask():
    assert {kind: merge_rule(kind) for kind in kinds()} == RULES
    with pytest.raises(InvalidSpec, match="unknown kind 'pile'"):
        merge_rule("pile")


def test_a_kind_merges_if_and_only_if_its_rule_says_so_and_stays_within_its_budget(case):
    memory = case.build()
    rows = [case.rows(400, vocabulary=20), case.rows(90, 1000, vocabulary=20), case.rows(0)]
    states = [written(memory, part) for part in rows]
    before = [memory.dump(state) for state in states]
    if merge_rule(case.kind) == "refused" or case.name == "titans-signs-deep":
        with pytest.raises(Unsupported, match="write both journals to a new bank"):
            memory.merge(states)
        return
    merged = memory.merge(states)
    assert memory.nbytes(merged) <= case.budget
    memory.load(memory.dump(merged))
    for state, dump in zip(states, before, strict=True):
        same(memory, state, memory.load(dump), skip=())
    found = memory.lookup(memory.absorb(merged, case.rows(9, 2000, vocabulary=20)), case.rows(9, 2000).keys_NK, 5)
    assert bool(torch.isfinite(found.values_QV).all())
    assert bool((found.similarity_Q > 0).all())


def test_no_states_and_states_of_another_form_are_refused(case):
    memory = case.build()
    if merge_rule(case.kind) == "refused" or case.name == "titans-signs-deep":
        pytest.skip("refused whatever the states")
    with pytest.raises(InvalidInput, match="at least one"):
        memory.merge([])
    if hasattr(memory, "init_state"):
        with pytest.raises(InvalidInput, match=r"states \[1\] and state 0"):
            memory.merge([memory.init_state(1), memory.init_state(2)])


def test_numbers_in_one_journal_are_those_of_rows_ordered_by_age():
    for counts in ([4, 2], [3, 3, 3], [0, 5], [7], [1, 9, 4]):
        aged = sorted((-(count - row), which, row) for which, count in enumerate(counts) for row in range(count))
        for which, count in enumerate(counts):
            expected = [at for at, (_, bank, _) in enumerate(aged) if bank == which]
            assert interleaved(torch.arange(count), which, counts).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"key_dtype": "int8"}, {"key_dims": 7}])
def test_the_best_of_merged_spalm_banks_are_the_best_of_their_union(options):
    memory, parts = make("spalm", 3, **options), [stream(n, n, value=3) for n in (40, 25, 60)]
    states, start = [], 0
    for source, part in enumerate(parts):
        states.append(memory.renumbered(written(memory, part), start, torch.tensor([source])))
        start += len(part)
    columns = [torch.cat([getattr(part, name) for part in parts]) for name in ("keys_NK", "tokens_N", "values_NV")]
    source = torch.cat([torch.full((len(part),), s) for s, part in enumerate(parts)])
    seq = torch.cat([part.seq_N for part in parts])
    whole = written(memory, EncodedRows(*columns, torch.arange(125), seq, source))
    for order in itertools.permutations(states):
        same(memory, memory.merge(order), whole)
    # a bank and its fork share rows
    same(memory, memory.merge([whole, *states]), whole)


def test_merged_spalm_banks_beyond_their_budget_keep_the_newest_rows():
    memory = make("spalm", budget=4000)
    old, new = written(memory, stream(50, 0)), written(memory, stream(50, 1))
    merged = memory.merge([memory.renumbered(new, 50, torch.tensor([0])), old])
    assert sorted(merged.held()["pos"].tolist()) == list(range(100 - memory.capacity, 100))
    same(memory, memory.absorb(memory.merge([merged]), stream(5, 2)), memory.absorb(merged, stream(5, 2)))


@pytest.mark.parametrize("counts", [(9, 14), (14, 9), (20, 1, 6)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("compressive", {"compressor": "mean"}),
        ("compressive", {"compressor": "max", "block": 8, "key_dtype": "int8"}),
        ("dct", {"policy": "keep"}),
        ("dct", {"policy": "novelty", "keep_rate": 0.6}),
        ("lemn", {"policy": "fifo"}),
        ("lemn", {"policy": "lifo"}),
        ("lemn", {"policy": "reservoir"}),
    ],
)
def test_below_capacity_a_merged_bank_is_the_bank_of_the_one_journal(kind, options, counts):
    memory = make(kind, 3, **options, **({"slots": 27} if kind == "lemn" else {"fine": 27, "coarse": 12}))
    parts = [stream(n, n, value=3) for n in counts]
    merged = memory.merge([written(memory, part) for part in parts])
    same(memory, merged, written(memory, one_journal(parts)))
    # and it goes on like one
    more = stream(31, 5, value=3)
    same(memory, memory.absorb(merged, more), memory.absorb(written(memory, one_journal(parts)), more))


@pytest.mark.parametrize("policy", ["fifo", "lifo", "reservoir"])
def test_rules_that_go_by_numbers_merge_as_if_one_stream_had_come_where_banks_are_of_one_age(policy):
    memory, parts = make("lemn", slots=11, policy=policy), [stream(n, n) for n in (30, 30)]
    merged = memory.merge([written(memory, part) for part in parts])
    numbers = merged["arrival"][0]
    rows = one_journal(parts)
    assert torch.equal(merged["key"][0], rows.keys_NK[numbers])
    if policy == "fifo":
        assert numbers.tolist() == list(range(49, 60))
    if policy == "lifo":
        assert numbers.tolist() == list(range(11))


@pytest.mark.parametrize("policy", ["uniform", "lru", "im", "s", "st"])
def test_a_merged_lemn_bank_holds_rows_of_its_parts_in_their_order_and_no_more_than_it_may(policy):
    memory, parts = make("lemn", slots=11, policy=policy), [stream(n, n) for n in (30, 17)]
    states = [written(memory, part) for part in parts]
    merged = memory.merge(states)
    rows, held = one_journal(parts), merged["arrival"][0]
    assert len(held) == 11
    assert bool((held.diff() > 0).all())
    assert torch.equal(merged["key"][0], rows.keys_NK[held])
    kept = torch.cat([state["key"][0] for state in states])
    assert bool((merged["key"][0][:, None] == kept).all(-1).any(1).all())


def test_lru_merges_by_what_was_used_last_in_either_bank():
    memory = make("lemn", slots=2, policy="lru")
    basis = torch.eye(16)

    def rows(keys):
        numbers = torch.arange(len(keys))
        return EncodedRows(torch.stack(keys), numbers, None, numbers, numbers, numbers)

    # axis 0 is old and used last of all but the newest rows; axis 1 was never used again
    first = written(memory, rows([basis[0], basis[1], basis[0] + 0.1 * basis[5]]))
    second = written(memory, rows([basis[2]]))
    merged = memory.merge([first, second])["key"][0]
    assert bool((merged @ basis[0] > 0.9).any())
    assert bool((merged @ basis[2] > 0.9).any())


@pytest.mark.parametrize("compressor", ["mean", "subsample", "most_used", "conv"])
def test_a_full_compressive_bank_merges_in_order_and_keeps_the_newest_rows_of_all(compressor):
    memory = make("compressive", fine=12, coarse=10, ratio=3, block=6, compressor=compressor)
    parts = [stream(n, n) for n in (61, 44, 5)]
    merged = memory.merge([written(memory, part) for part in parts])
    rows = one_journal(parts)
    fine, coarse = memory.in_order(merged)
    assert 12 <= len(fine["key"]) < 18
    assert torch.equal(fine["key"], rows.keys_NK[-len(fine["key"]) :])
    assert len(coarse["key"]) == 10
    assert 110 - 6 < int(merged["count"]) <= 110


def test_a_novelty_policy_decides_again_and_takes_what_both_banks_know_once():
    memory = make("dct", fine=2, coarse=32, ratio=2, policy="novelty", threshold=0.2, compressor="mean")
    basis = torch.eye(16)

    def rows(axes):
        numbers = torch.arange(2 * len(axes))
        return EncodedRows(basis[axes].repeat_interleave(2, 0), numbers, None, numbers, numbers, numbers)

    # the last two rows stay fine
    states = [written(memory, rows([0, 1, 9])), written(memory, rows([1, 2, 9]))]
    assert [int(state["kept"]) for state in states] == [2, 2]
    merged = memory.merge(states)
    known = memory.in_order(merged)[1]["key"].argmax(1).tolist()
    assert sorted(known[:3]) == [0, 1, 2]
    assert int(merged["seen"]) == 5


def test_a_linear_titans_memory_merges_exactly_where_banks_have_orthogonal_keys():
    memory = make("titans", 4, values="vectors", chunk=5)
    parts = [stream(n, n, value=4) for n in (20, 15)]
    for part, axes in zip(parts, (slice(8, None), slice(None, 8)), strict=True):
        part.keys_NK[:, axes] = 0
        part.keys_NK[:] = normalize(part.keys_NK, dim=1)
    merged = memory.merge([written(memory, part) for part in parts])
    both = taken(parts, [(0, row) for row in range(20)] + [(1, row) for row in range(15)])
    whole = written(memory, both)
    # sums of float32 in another order
    assert torch.allclose(merged["weight_0"], whole["weight_0"], atol=1e-6)
    assert int(merged["count"]) == 35


@pytest.mark.parametrize("options", [{}, {"values": "onehot"}, {"values": "vectors"}, {"values": "signs"}])
def test_titans_rows_that_still_wait_merge_as_one_journal(options):
    memory = make("titans", 4, chunk=16, **options)
    parts = [stream(n, n, value=4) for n in (7, 3, 12)]
    merged = memory.merge([written(memory, part) for part in parts])
    same(memory, merged, written(memory, one_journal(parts)))


def test_merged_titans_banks_know_the_tokens_of_both_and_forget_the_stalest_where_there_are_too_many():
    memory = make("titans", slots=16, chunk=16)
    states = []
    for seed, first in ((0, 0), (1, 100)):
        part = stream(160, seed, vocabulary=10)
        states.append(written(memory, EncodedRows(part.keys_NK, part.tokens_N + first, None, *(3 * [part.pos_N]))))
    merged = memory.merge(states)
    known = merged["slot_token"][0].tolist()
    assert len(set(known)) == 16
    assert set(known) <= set(range(10)) | set(range(100, 110))
    for state in states:
        for slot, token in enumerate(state["slot_token"][0].tolist()):
            if token in known:
                change = merged["weight_0"][0, :, known.index(token)]
                assert torch.allclose(change, state["weight_0"][0, :, slot], atol=1e-6)


def test_arenas_merge_bank_by_bank():
    memory = make("compressive", fine=9, coarse=6)
    states = [[written(memory, stream(n, n + bank)) for n in (30, 4)] for bank in (0, 50)]
    arenas = [{name: torch.cat([bank[at][name] for bank in states]) for name in states[0][0]} for at in (0, 1)]
    merged = memory.merge(arenas)
    for bank, own in enumerate(states):
        alone = memory.merge(own)
        assert all(torch.equal(merged[name][bank : bank + 1], alone[name]) for name in alone)
