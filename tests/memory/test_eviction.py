"""One policy object, whatever the memory: LEMN, DNC, DCT and SPALM keep the rows that it says."""

import pytest
import torch
from torch.nn.functional import normalize

from raymem.memory import build
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.dnc import next_usage, tape_step
from raymem.memory.key_reservoir import hash62
from raymem.memory.policies import Entries, policy

WIDTH, ROOM, COUNT = 16, 12, 60
# not "uniform": its draws go by slots, and memories place rows differently
PLAIN = ["fifo", "lifo", "reservoir", "lru", "im"]


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


def rows_of(keys: torch.Tensor, start: int = 0) -> EncodedRows:
    numbers = torch.arange(start, start + len(keys))
    return EncodedRows(keys, numbers, None, numbers, numbers, torch.zeros_like(numbers))


def make(kind: str, name: str):
    """A bank with room for ROOM entries; DCT's are blocks of one row, and the last two rows are still fine."""
    options = {
        "lemn": {"slots": ROOM, "policy": name},
        "dnc": {"slots": ROOM, "eviction": name},
        "dct": {"fine": 2, "coarse": ROOM, "ratio": 1, "policy": "keep", "eviction": name},
        "spalm": {"eviction": name, "n_short": 0, "key_dtype": "float32", "tau": 1 / 16},
    }[kind]
    # a row of spalm takes 4 bytes a dimension and 28 more, and what a policy keeps of it
    extra = {"lru": 8, "im": 4}.get(name, 0)
    budget = (4 * WIDTH + 32 + extra) * ROOM if kind == "spalm" else 2**22
    return build(kind, Dims(WIDTH, 0), options, budget).requires_grad_(False)


def held(memory, state) -> list[int]:
    """Numbers of the rows that the policy kept: each row's token is its number."""
    if memory.kind == "spalm":
        return sorted(state.held()["token"].tolist())
    if memory.kind == "dct":
        return sorted(memory.in_order(state)[1]["token"].flatten().tolist())
    return sorted(state["token"][0].tolist())


def simulated(name: str, keys: torch.Tensor) -> list[int]:
    """What the policy says, by the book: a list of rows, and one goes when there are too many."""
    rule, kept = policy(name, WIDTH, strength=16.0, gamma=0.5, hidden=4).requires_grad_(False), []
    own = {n: torch.zeros(0, *spec.shape, dtype=spec.dtype) for n, spec in rule.spec().items()}
    for number in range(len(keys)):
        at = torch.tensor(kept, dtype=torch.int64)
        entries = Entries(keys[None, at], at[None], keys[None, number], torch.tensor([number]))
        if kept:
            logits, seen = rule({n: c[None] for n, c in own.items()}, entries)
        else:
            # nothing to attend to, nothing used
            logits, seen = (
                torch.zeros(1, 1),
                {n: c.new_full((1, 1), number if n == "used" else 0) for n, c in own.items()},
            )
        own = {n: c[0] for n, c in seen.items()}
        kept.append(number)
        if len(kept) > ROOM:
            goes = int(logits.argmax())
            kept = kept[:goes] + kept[goes + 1 :]
            own = {n: torch.cat([c[:goes], c[goes + 1 :]]) for n, c in own.items()}
    return kept


@pytest.mark.parametrize("kind", ["lemn", "dnc", "dct", "spalm"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_memory_keeps_the_rows_that_the_policy_says(kind, name):
    memory = make(kind, name)
    if kind == "spalm":
        assert memory.capacity == ROOM
    keys = drawn(COUNT)
    # dct decides about a row once two more have come
    state = memory.absorb(memory.empty(), rows_of(torch.cat([keys, drawn(2, 1)]) if kind == "dct" else keys))
    if name == "im" and kind == "lemn":
        pytest.skip("the others are compared with it")
    expected = held(make("lemn", "im"), written("lemn", "im", keys)) if name == "im" else simulated(name, keys)
    assert held(memory, state) == expected


def written(kind: str, name: str, keys: torch.Tensor):
    memory = make(kind, name)
    return memory.absorb(memory.empty(), rows_of(keys))


def test_what_the_plain_policies_say():
    keys = drawn(COUNT)
    assert simulated("fifo", keys) == list(range(COUNT - ROOM, COUNT))
    assert simulated("lifo", keys) == list(range(ROOM))
    assert simulated("reservoir", keys) == sorted((hash62(torch.arange(COUNT)) >> 38).topk(ROOM).indices.tolist())


def test_a_row_used_again_and_again_outlives_the_others_under_lru():
    keys = drawn(COUNT)
    keys[5::4] = normalize(keys[5] + 0.05 * keys[5::4], dim=1)
    for kind in ("lemn", "dnc", "dct", "spalm"):
        for name, stays in (("lru", True), ("fifo", False)):
            memory = make(kind, name)
            state = memory.absorb(memory.empty(), rows_of(keys[:40]))
            assert (any(token % 4 == 1 and token < 20 for token in held(memory, state))) is stays, (kind, name)


@pytest.mark.parametrize("name", ["lifo", "reservoir", "uniform", "lru", "im"])
def test_spalm_s_newest_rows_are_never_taken(name):
    memory = build("spalm", Dims(WIDTH, 0), {"eviction": name, "n_short": 7}, 3000).requires_grad_(False)
    state = memory.empty()
    for start in range(0, 200, 9):
        state = memory.absorb(state, rows_of(drawn(9, start), start))
        tokens = state.held()["token"].tolist()
        assert set(range(start + 2, start + 9)) <= set(tokens)
        assert memory.nbytes(state) <= 3000
    assert len(tokens) == memory.capacity


def test_a_spalm_row_that_was_forgotten_leaves_room_for_the_next():
    memory = make("spalm", "lifo")
    state = memory.absorb(memory.empty(), rows_of(drawn(30)))
    state = memory.forget(state, torch.tensor([3, 4]))
    state = memory.absorb(state, rows_of(drawn(3, 1), 40))
    assert held(memory, state) == [0, 1, 2, *range(5, 12), 40, 41]


@pytest.mark.parametrize("name", ["lifo", "uniform", "reservoir", "lru"])
def test_a_tape_whose_slots_a_policy_frees_is_what_the_full_equations_write(name):
    memory = build("dnc", Dims(WIDTH, 0), {"slots": 5, "eviction": name}, 2**20).requires_grad_(False)
    state, keys = memory.empty(), drawn(23)
    slow = {n: torch.zeros(1, *shape) for n, shape in FULL.items()}
    for number, key in enumerate(keys):
        before = state["arrival"].clone()
        state = memory.absorb(state, rows_of(key[None], number))
        changed = torch.nonzero(state["arrival"][0] != before[0])[:, 0]
        if len(changed):
            slow = tape_step(slow, key[None], changed)
        dense = memory.dense(state)
        # the equations count a write as usage in the next step
        used = next_usage(slow["usage"], slow["write_weights"], torch.ones(1, 5))
        assert torch.equal(dense["usage"], used)
        for part in ("link", "precedence"):
            assert torch.equal(dense[part], slow[part]), (number, part)
        assert torch.allclose(state["key"], slow["memory"])


FULL = {
    "memory": (5, WIDTH),
    "usage": (5,),
    "link": (5, 5),
    "precedence": (5,),
    "write_weights": (5,),
    "read_weights": (1, 5),
    "reads": (1, WIDTH),
}


def test_a_discarded_newcomer_of_dct_is_in_the_log_as_such():
    memory = make("dct", "lifo")
    state = memory.absorb(memory.empty(), rows_of(drawn(ROOM + 5)))
    assert [line.kept for line in memory.decisions(state)] == [True] * ROOM + [False] * 3
    assert int(state["kept"]) == ROOM


@pytest.mark.parametrize("kind", ["dnc", "dct", "spalm"])
@pytest.mark.parametrize("name", ["uniform", "reservoir", "im", "st"])
def test_cutting_the_stream_elsewhere_gives_the_same_bits(kind, name):
    memory, keys = make(kind, name) if name != "st" or kind != "spalm" else _agent(), drawn(40)
    whole = memory.dump(memory.absorb(memory.empty(), rows_of(keys)))
    state = memory.empty()
    for start, end in ((0, 1), (1, 14), (14, 14), (14, 31), (31, 40)):
        state = memory.absorb(state, rows_of(keys[start:end], start))
    again = memory.dump(memory.load(memory.dump(state)))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def _agent():
    options = {"eviction": "st", "hidden": 3, "n_short": 2}
    return build("spalm", Dims(WIDTH, 0), options, 1500).requires_grad_(False)
