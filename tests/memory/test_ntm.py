"""The NTM's equations against hand-worked cases and a numpy transcription; its ring against the equations."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from raymem.errors import InvalidSpec, Unsupported
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.ntm import Heads, Ntm, address, interpolated, read, ring_step, sharpened, shifted, step, write
from raymem.memory.ntm_cell import NtmCell
from raymem.memory.slots import CountedSlotOptions

B, N, W, H = 3, 7, 5, 2
LARGE = 2**24


def hot(*places: int, slots: int = N) -> torch.Tensor:
    return one_hot(torch.tensor(places), slots).double()


def drawn_heads(count: int = H, **changes) -> Heads:
    heads = Heads(
        key=torch.randn(B, count, W, dtype=torch.float64),
        strength=5 * torch.rand(B, count, dtype=torch.float64),
        gate=torch.rand(B, count, dtype=torch.float64),
        shift=torch.softmax(torch.randn(B, count, 5, dtype=torch.float64), -1),
        sharpening=1 + 2 * torch.rand(B, count, dtype=torch.float64),
    )
    return heads._replace(**changes)


def drawn_weights(count: int = H) -> torch.Tensor:
    return torch.softmax(torch.randn(B, count, N, dtype=torch.float64), -1)


def drawn_memory() -> torch.Tensor:
    return torch.randn(B, N, W, dtype=torch.float64)


def test_j1_what_was_written_at_one_slot_is_read_there_and_nothing_else_changed():
    memory, at = drawn_memory(), hot(4)[None].expand(B, -1, -1)
    add = torch.randn(B, 1, W, dtype=torch.float64)
    after = write(memory, at, torch.ones(B, 1, W).double(), add)
    assert torch.equal(read(after, at), add)
    others = torch.arange(N) != 4
    assert torch.equal(after[:, others], memory[:, others])


def test_j2_erasing_and_adding_nothing_changes_nothing_and_erasing_all_leaves_zeros():
    memory, at = drawn_memory(), hot(4)[None].expand(B, -1, -1)
    zeros, ones = torch.zeros(B, 1, W).double(), torch.ones(B, 1, W).double()
    assert torch.equal(write(memory, drawn_weights(1), zeros, zeros), memory)
    assert not write(memory, at, ones, zeros)[:, 4].any()


@pytest.mark.parametrize(("offset", "expected"), [(-2, 0), (-1, 1), (0, 2), (1, 3), (2, 4)])
def test_j3_the_last_entry_of_a_shift_moves_furthest_onward(offset, expected):
    moved = shifted(hot(2), hot(2 + offset, slots=5))
    assert torch.equal(moved, hot(expected))


def test_j3_a_head_that_moves_on_comes_around():
    heads = drawn_heads(1, gate=torch.zeros(B, 1).double(), sharpening=torch.ones(B, 1).double())
    heads = heads._replace(shift=hot(3, slots=5)[None].expand(B, -1, -1))
    weights, memory = hot(2)[None].expand(B, -1, -1), drawn_memory()
    for place in (3, 4, 5, 6, 0, 1, 2):
        weights = address(memory, heads, weights)
        assert torch.allclose(weights, hot(place)[None].expand(B, -1, -1), atol=1e-25)


def test_j4_strength_goes_from_looking_everywhere_to_looking_at_one_slot():
    memory = drawn_memory()
    heads = drawn_heads(1, key=memory[:, 3:4], gate=torch.ones(B, 1).double(), sharpening=torch.ones(B, 1).double())
    heads = heads._replace(shift=hot(2, slots=5)[None].expand(B, -1, -1))
    spread = address(memory, heads._replace(strength=torch.zeros(B, 1).double()), drawn_weights(1))
    assert torch.allclose(spread, torch.full_like(spread, 1 / N))
    exact = address(memory, heads._replace(strength=torch.full((B, 1), 1e4).double()), drawn_weights(1))
    assert torch.allclose(exact, hot(3)[None].expand(B, -1, -1))


def test_j5_weightings_stay_weightings_and_a_power_of_one_leaves_them():
    weights = drawn_weights()
    assert torch.allclose(sharpened(weights, torch.ones(B, H).double()), weights, rtol=1e-14)
    for _ in range(30):
        weights = address(drawn_memory(), drawn_heads(), weights)
        assert weights.min() >= 0
        assert torch.allclose(weights.sum(-1), torch.ones(B, H).double())


def test_the_gate_chooses_between_content_and_the_last_place():
    content, previous = drawn_weights(), drawn_weights()
    assert torch.equal(interpolated(content, previous, torch.ones(B, H).double()), content)
    assert torch.equal(interpolated(content, previous, torch.zeros(B, H).double()), previous)


def test_large_powers_of_small_weights_neither_vanish_nor_lose_their_slope():
    weights = torch.tensor([1e-20, 2e-20, 0.0]).requires_grad_()
    found = sharpened(weights, torch.tensor(10.0))
    assert torch.allclose(found, torch.tensor([1 / 1025, 1024 / 1025, 0.0]))
    found[0].backward()
    assert torch.isfinite(weights.grad).all()


def test_writing_heads_write_in_turn():
    memory, weights = drawn_memory(), drawn_weights()
    erase, add = torch.rand(B, H, W).double(), torch.randn(B, H, W).double()
    after = write(memory, weights, erase, add)
    one = write(memory, weights[:, :1], erase[:, :1], add[:, :1])
    assert torch.equal(after, write(one, weights[:, 1:], erase[:, 1:], add[:, 1:]))
    assert not torch.allclose(after, write(memory, weights.flip(1), erase.flip(1), add.flip(1)))


def numpy_address(memory, heads, previous):
    """One bank and head, loops and all: section 3.3 of the paper."""
    cos = np.array([heads.key @ m / (np.linalg.norm(heads.key) * np.linalg.norm(m) + 1e-6) for m in memory])
    content = np.exp(heads.strength * cos) / np.exp(heads.strength * cos).sum()
    gated = heads.gate * content + (1 - heads.gate) * previous
    reach = len(heads.shift) // 2
    s = {offset % N: heads.shift[reach + offset] for offset in range(-reach, reach + 1)}
    moved = np.array([sum(gated[j] * s.get((i - j) % N, 0) for j in range(N)) for i in range(N)])
    return moved**heads.sharpening / (moved**heads.sharpening).sum()


def test_a_numpy_transcription_agrees_and_reading_comes_before_writing():
    state = {
        "memory": drawn_memory(),
        "read_weights": drawn_weights(),
        "write_weights": drawn_weights(1),
        "reads": torch.zeros(B, H, W).double(),
    }
    for _ in range(5):
        readers, writers = drawn_heads(), drawn_heads(1)
        erase, add = torch.rand(B, 1, W).double(), torch.randn(B, 1, W).double()
        after = step(state, readers, writers, erase, add)
        for b in range(B):
            memory = state["memory"][b].numpy()
            for h in range(H):
                one = Heads(*(part[b, h].numpy() for part in readers))
                weights = numpy_address(memory, one, state["read_weights"][b, h].numpy())
                np.testing.assert_allclose(after["read_weights"][b, h].numpy(), weights, atol=1e-14)
                np.testing.assert_allclose(after["reads"][b, h].numpy(), weights @ memory, atol=1e-13)
            one = Heads(*(part[b, 0].numpy() for part in writers))
            weights = numpy_address(memory, one, state["write_weights"][b, 0].numpy())
            e, a = erase[b, 0].numpy(), add[b, 0].numpy()
            expected = memory * (1 - np.outer(weights, e)) + np.outer(weights, a)
            np.testing.assert_allclose(after["memory"][b].numpy(), expected, atol=1e-13)
        state = after


def test_gradients_reach_everything_a_controller_says():
    heads = Heads(*(part.requires_grad_() for part in drawn_heads(1)))
    previous = drawn_weights(1).requires_grad_()
    memory = drawn_memory().requires_grad_()
    address(memory, heads, previous).square().sum().backward()
    for given in (*heads, previous, memory):
        assert torch.isfinite(given.grad).all()
        assert given.grad.abs().max() > 0
    inputs = (drawn_memory(), drawn_heads(1), drawn_weights(1))
    flat = [x.requires_grad_() for x in (inputs[0], *inputs[1], inputs[2])]
    assert torch.autograd.gradcheck(lambda m, *rest: address(m, Heads(*rest[:-1]), rest[-1]), flat)


K, V = 6, 4


def ring(slots: int = N, value: int = V, **options) -> Ntm:
    return Ntm(Dims(K, value), CountedSlotOptions(slots=slots, **options), LARGE)


def rows_of(count: int, value: int = V) -> EncodedRows:
    keys = normalize(torch.randn(count, K), dim=-1)
    number = torch.arange(count)
    return EncodedRows(keys, number + 100, torch.randn(count, value) if value else None, number, number, number * 0)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 30])
def test_the_ring_is_what_the_full_equations_write_under_its_script(count):
    memory, rows = ring(), rows_of(count)
    with torch.no_grad():
        quick = memory.absorb(memory.empty(), rows)
    slots, weights = torch.zeros(1, N, K + V), memory.pointer(memory.empty())
    for word in torch.cat([rows.keys_NK, rows.values_NV], 1):
        slots, weights = ring_step(slots, weights, word[None])
    # the sharpening's least weight leaves some 1e-30 of a word elsewhere
    assert torch.allclose(torch.cat([quick["key"], quick["value"]], -1), slots, atol=1e-25, rtol=0)
    assert torch.allclose(memory.pointer(quick), weights, atol=1e-25)


def test_reads_are_by_content_with_the_strength_asked_for():
    memory, rows = ring(strength=20.0), rows_of(5)
    found = memory.lookup(memory.absorb(memory.empty(), rows), rows.keys_NK, 9)
    weights = torch.softmax(20.0 * rows.keys_NK @ rows.keys_NK.T, -1)
    assert torch.equal(found.tokens_Qk[:, :5], rows.tokens_N[weights.argsort(descending=True)])
    assert torch.allclose(found.scores_Qk[:, :5].exp(), weights.sort(descending=True).values, atol=1e-4)
    assert (found.tokens_Qk[:, 5:] == -1).all()
    assert torch.allclose(found.values_QV, weights @ rows.values_NV, atol=1e-4)


def test_the_ring_overwrites_the_oldest():
    memory, rows = ring(value=0), rows_of(30, 0)
    state = memory.absorb(memory.empty(), rows)
    assert sorted(state["token"][0].tolist()) == list(range(123, 130))


def test_a_budget_too_small_is_refused_with_its_numbers():
    with pytest.raises(InvalidSpec, match=r"budget_bytes=4096 leaves a ntm bank 7 slots of 404 bytes; it needs 16"):
        Ntm(Dims(100, 0), CountedSlotOptions(), 4096)


def test_rings_are_not_merged():
    with pytest.raises(Unsupported, match="slots are places"):
        ring().merge([ring().empty()])


@pytest.mark.parametrize("heads", [(1, 1), (2, 3)])
def test_a_cell_carries_on_where_its_state_left_off(heads):
    cell = NtmCell(3, 2, slots=6, word=5, readers=heads[0], writers=heads[1], hidden=7)
    inputs = torch.randn(4, 9, 3)
    whole, _ = cell(inputs)
    first, state = cell(inputs[:, :4])
    rest, _ = cell(inputs[:, 4:], state)
    assert torch.equal(torch.cat([first, rest], 1), whole)
    whole.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in cell.parameters())
