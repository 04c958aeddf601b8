"""The DNC's equations against cases by hand, a numpy transcription and the package dnc; its tape against them all."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from raymem.errors import InvalidSpec, InvalidTrace, Unsupported
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.dnc import (
    BACKWARD,
    CONTENT,
    FORWARD,
    Dnc,
    DncOptions,
    Interface,
    allocation,
    empty_slots,
    next_usage,
    read,
    retention,
    sharpened,
    step,
    tape_step,
    write,
)
from raymem.memory.dnc_cell import DncCell

B, N, W, R = 3, 8, 5, 2
LARGE = 2**24


def hot(*places: int, slots: int = N) -> torch.Tensor:
    return one_hot(torch.tensor(places), slots).double()


def drawn_interface(batch: int = B, heads: int = R, word: int = W, **changes) -> Interface:
    def gate(*shape):
        return torch.rand(batch, *shape, dtype=torch.float64)

    says = Interface(
        read_keys=torch.randn(batch, heads, word, dtype=torch.float64),
        read_strengths=1 + gate(heads),
        write_key=torch.randn(batch, word, dtype=torch.float64),
        write_strength=1 + 5 * gate(),
        erase=gate(word),
        write_vector=torch.randn(batch, word, dtype=torch.float64),
        free_gates=gate(heads),
        allocation_gate=gate(),
        write_gate=gate(),
        modes=torch.softmax(torch.randn(batch, heads, 3, dtype=torch.float64), -1),
    )
    return says._replace(**changes)


def drawn_state(steps: int = 6, batch: int = B) -> dict[str, torch.Tensor]:
    state = empty_slots(batch, N, W, R, torch.float64)
    # distinct usages: other implementations break ties in another order
    state["usage"] = torch.rand(batch, N, dtype=torch.float64)
    for _ in range(steps):
        state = step(state, drawn_interface(batch))
    return state


def moves(mode: int, heads: int = 1) -> torch.Tensor:
    return one_hot(torch.full((1, heads), mode), 3).double()


def test_j1_a_write_uses_its_slot_and_a_free_gate_frees_what_was_read():
    usage = torch.rand(1, N, dtype=torch.float64)
    kept = torch.ones(1, N, dtype=torch.float64)
    after = next_usage(usage, hot(3), kept)
    assert after[0, 3] == 1
    others = torch.arange(N) != 3
    assert torch.equal(after[:, others], usage[:, others])
    freed = next_usage(usage, torch.zeros(1, N).double(), retention(torch.ones(1, 1).double(), hot(5)[:, None]))
    assert freed[0, 5] == 0
    assert torch.equal(freed[:, torch.arange(N) != 5], usage[:, torch.arange(N) != 5])


@pytest.mark.parametrize(
    ("usage", "expected"),
    [((0.5, 0.2, 1.0), (0.1, 0.8, 0.0)), ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), ((0.7, 0.0, 0.3), (0.0, 1.0, 0.0))],
)
def test_j2_allocation_by_hand(usage, expected):
    found = allocation(torch.tensor([usage], dtype=torch.float64), epsilon=0.0)
    assert torch.allclose(found, torch.tensor([expected], dtype=torch.float64))


def test_j2_ties_go_in_the_order_of_slots():
    assert torch.equal(allocation(torch.zeros(1, N).double(), epsilon=0.0), hot(0))
    used = torch.zeros(1, N).double()
    used[0, :3] = 1
    assert torch.equal(allocation(used, epsilon=0.0), hot(3))


def test_j3_two_writes_are_linked_in_their_order():
    state = empty_slots(1, N, W, 1, torch.float64)
    says = drawn_interface(1, 1, write_gate=torch.ones(1).double(), allocation_gate=torch.ones(1).double())
    for _ in range(2):
        state = write(state, says._replace(free_gates=torch.zeros(1, 1).double()), epsilon=0.0)
    expected = torch.zeros(1, N, N).double()
    expected[0, 1, 0] = 1
    assert torch.equal(state["link"], expected)
    assert torch.equal(state["precedence"], hot(1))


@pytest.mark.parametrize("rows", [5, 8, 20])
def test_j4_replay_in_both_directions_is_exact_also_after_slots_were_used_again(rows):
    words = torch.randn(rows, W, dtype=torch.float64)
    state = empty_slots(1, N, W, 1, torch.float64)
    for word in words:
        state = tape_step(state, word[None])
    kept = words[-N:]
    says = drawn_interface(1, 1)
    for mode, order in ((FORWARD, kept), (BACKWARD, kept.flip(0))):
        start = int((state["memory"][0] == order[0]).all(-1).nonzero())
        state["read_weights"] = hot(start)[:, None]
        for word in order[1:]:
            state = read(state, says._replace(modes=moves(mode)))
            assert torch.equal(state["reads"][0, 0], word)
        # nothing lies beyond the end
        assert not read(state, says._replace(modes=moves(mode)))["reads"].any()


def test_ten_slots_serve_ten_sequences_when_each_is_freed_as_it_is_read(figure):
    # extended data figure 1 of the paper, with its script instead of a trained controller
    slots, written, lost = 10, set(), 0
    state = empty_slots(1, slots, W, 1, torch.float64)
    # what was read in one step is freed in the next
    free = {"free_gates": torch.ones(1, 1).double()}
    busy = free | {"write_gate": torch.ones(1).double(), "allocation_gate": torch.ones(1).double()}
    idle = {"erase": torch.ones(1, W).double(), "modes": torch.zeros(1, 1, 3).double()}
    still = free | {"write_gate": torch.zeros(1).double()}
    for _ in range(10):
        words = torch.randn(slots, 1, W, dtype=torch.float64)
        for word in words:
            says = drawn_interface(1, 1, write_vector=word, **busy, **idle)
            state = step(state, says, epsilon=0.0)
            written.add(int(state["write_weights"].argmax()))
        for place, word in enumerate(words):
            sharp = torch.full((1, 1), 1e4, dtype=torch.float64)
            mode = moves(FORWARD if place else CONTENT)
            says = drawn_interface(1, 1, read_keys=word[:, None], read_strengths=sharp, modes=mode, **still)
            state = step(state, says, epsilon=0.0)
            lost += not torch.equal(state["reads"][:, 0], word)
    # a hundred writes, and every slot had its turns
    assert written == set(range(slots))
    figure("dnc", "100 rows through 10 slots that are used again, rows lost", lost, below=0)


def test_j5_invariants_hold_over_random_steps():
    state = drawn_state(0)
    for _ in range(60):
        state = step(state, drawn_interface())
        link, usage, weights = state["link"], state["usage"], state["write_weights"]
        # sums of eight float64 terms
        assert link.min() >= 0
        assert max(link.sum(1).max(), link.sum(2).max(), weights.sum(1).max(), usage.max()) <= 1 + 1e-12
        assert not link.diagonal(dim1=1, dim2=2).any()
        assert min(usage.min(), weights.min(), state["read_weights"].min()) >= 0
        assert allocation(usage).sum(1).max() <= 1 + 1e-12


def test_j6_a_closed_write_gate_changes_neither_memory_nor_links():
    state = drawn_state()
    after = write(state, drawn_interface(write_gate=torch.zeros(B).double()))
    for name in ("memory", "link", "precedence"):
        assert torch.equal(state[name], after[name])


def numpy_step(s: dict[str, np.ndarray], says: Interface) -> dict[str, np.ndarray]:
    """One bank, loops and all: the paper's methods section, line by line."""
    f, x = {name: None if part is None else part[0].numpy() for name, part in says._asdict().items()}, dict(s)

    def content(memory, key, strength):
        cos = np.array([key @ row / (np.linalg.norm(key) * np.linalg.norm(row) + 1e-6) for row in memory])
        grown = np.exp(strength * cos)
        return grown / grown.sum()

    kept = np.prod([1 - gate * w for gate, w in zip(f["free_gates"], s["read_weights"], strict=True)], axis=0)
    x["usage"] = (s["usage"] + s["write_weights"] - s["usage"] * s["write_weights"]) * kept
    raised = 1e-6 + (1 - 1e-6) * x["usage"]
    free, product = np.zeros(N), 1.0
    for slot in np.argsort(raised, kind="stable"):
        free[slot] = (1 - raised[slot]) * product
        product *= raised[slot]
    found = content(s["memory"], f["write_key"], f["write_strength"])
    w = f["write_gate"] * (f["allocation_gate"] * free + (1 - f["allocation_gate"]) * found)
    x["write_weights"] = w
    x["memory"] = s["memory"] * (1 - np.outer(w, f["erase"])) + np.outer(w, f["write_vector"])
    x["link"] = np.array(
        [
            [0 if i == j else (1 - w[i] - w[j]) * s["link"][i, j] + w[i] * s["precedence"][j] for j in range(N)]
            for i in range(N)
        ]
    )
    x["precedence"] = (1 - w.sum()) * s["precedence"] + w
    x["read_weights"] = np.stack(
        [
            pi[0] * x["link"].T @ last + pi[1] * x["link"] @ last + pi[2] * content(x["memory"], key, strength)
            for pi, last, key, strength in zip(
                f["modes"], s["read_weights"], f["read_keys"], f["read_strengths"], strict=True
            )
        ]
    )
    x["reads"] = x["read_weights"] @ x["memory"]
    return x


def test_a_numpy_transcription_of_the_paper_agrees():
    state = drawn_state(0, batch=1)
    other = {name: tensor[0].numpy() for name, tensor in state.items()}
    for _ in range(12):
        says = drawn_interface(1)
        state, other = step(state, says), numpy_step(other, says)
        for name in other:
            np.testing.assert_allclose(state[name][0].numpy(), other[name], atol=1e-14)


def test_the_package_dnc_agrees():
    # only its Memory is a DNC's; its controller feeds the reads from before the sequence
    import dnc.memory as peer_module

    peer = peer_module.Memory(input_size=3, mem_size=N, cell_size=W, read_heads=R).double()
    peer.I = peer.I.double()
    hidden = {name: tensor.double() for name, tensor in peer.reset(B).items()}
    state = drawn_state(0)
    hidden["usage_vector"] = state["usage"].clone()
    for _ in range(12):
        says = drawn_interface()
        state = step(state, says)
        written = (says.write_key, says.write_vector, says.erase)
        gates = (says.write_strength, says.write_gate, says.allocation_gate)
        hidden = peer.write(
            written[0][:, None],
            written[1][:, None],
            written[2][:, None],
            says.free_gates,
            says.read_strengths,
            *(gate[:, None] for gate in gates),
            hidden,
        )
        reads, hidden = peer.read(says.read_keys, says.read_strengths, says.modes, hidden)
        assert torch.allclose(state["reads"], reads, atol=1e-14)
        assert torch.allclose(state["link"], hidden["link_matrix"][:, 0], atol=1e-14)
        assert torch.allclose(state["usage"], hidden["usage_vector"], atol=1e-14)


def test_masked_lookup_ignores_what_the_mask_hides():
    state = drawn_state()
    mask = torch.ones(B, R, W, dtype=torch.float64)
    mask[:, :, 3:] = 0
    says = drawn_interface(modes=moves(CONTENT, R).expand(B, -1, -1), read_masks=mask)
    noisy = says.read_keys.clone()
    noisy[:, :, 3:] = 99
    changed = state | {"memory": state["memory"] + torch.cat([torch.zeros(3), torch.ones(2)]).double()}
    found = read(state, says)["read_weights"]
    assert torch.allclose(read(changed, says._replace(read_keys=noisy))["read_weights"], found)
    whole = read(state, says._replace(read_masks=torch.ones_like(mask)))["read_weights"]
    assert torch.allclose(whole, read(state, says._replace(read_masks=None))["read_weights"])
    assert not torch.allclose(whole, found)


def test_deallocation_wipes_what_was_freed_and_only_that():
    state = drawn_state() | {"read_weights": hot(4, 4)[None].expand(B, -1, -1)}
    says = drawn_interface(write_gate=torch.zeros(B).double(), free_gates=torch.ones(B, R).double())
    wiped, left = write(state, says, deallocate=True)["memory"], write(state, says)["memory"]
    assert not wiped[:, 4].any()
    assert left[:, 4].any()
    assert torch.equal(wiped[:, :4], left[:, :4])


def test_sharpening_keeps_mass_and_order_and_approaches_one_hot():
    weights = torch.tensor([[0.5, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    same = sharpened(weights, torch.ones(2).double())
    assert torch.allclose(same, weights, atol=1e-9)
    sharp = sharpened(weights, torch.full((2,), 50.0).double())
    assert torch.allclose(sharp, torch.tensor([[0.8, 0, 0, 0], [0.0, 0, 0, 0]]).double(), atol=1e-9)


def test_gradients_reach_everything_a_controller_says():
    state = drawn_state()
    says = drawn_interface(sharpness=torch.full((B, R, 2), 2.0).double(), write_mask=torch.rand(B, W).double())
    says = Interface(*(None if part is None else part.requires_grad_() for part in says))
    for _ in range(2):
        state = step(state, says, deallocate=True)
    state["reads"].square().sum().backward()
    for name, part in says._asdict().items():
        assert part is None or (torch.isfinite(part.grad).all() and part.grad.abs().max() > 0), name


K, V = 6, 4


def tape(slots: int = N, value: int = V, **options) -> Dnc:
    return Dnc(Dims(K, value), DncOptions(slots=slots, **options), LARGE)


def rows_of(count: int, value: int = V) -> EncodedRows:
    keys = normalize(torch.randn(count, K, generator=torch.Generator().manual_seed(count)), dim=-1)
    values = torch.randn(count, value) if value else None
    number = torch.arange(count)
    return EncodedRows(keys, number + 100, values, number, number, number * 0)


def pick(rows: EncodedRows, part: slice) -> EncodedRows:
    values = None if rows.values_NV is None else rows.values_NV[part]
    return EncodedRows(
        rows.keys_NK[part], rows.tokens_N[part], values, rows.pos_N[part], rows.seq_N[part], rows.source_N[part]
    )


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 13, 29])
@pytest.mark.parametrize("slots", [1, 8])
def test_the_tape_is_what_the_full_equations_write_under_its_script(count, slots):
    memory, rows = tape(slots), rows_of(count)
    with torch.no_grad():
        quick = memory.absorb(memory.empty(), rows)
    slow = empty_slots(1, slots, K + V, 1)
    for word in torch.cat([rows.keys_NK, rows.values_NV], 1):
        slow = tape_step(slow, word[None])
    dense = memory.dense(quick)
    assert torch.equal(torch.cat([quick["key"], quick["value"]], -1), slow["memory"])
    assert torch.equal(dense["usage"], next_usage(slow["usage"], slow["write_weights"], torch.ones(1, slots)))
    assert torch.equal(dense["link"], slow["link"])
    assert torch.equal(dense["precedence"], slow["precedence"])


@pytest.mark.parametrize("count", [6, 8, 21])
def test_replay_tells_what_came_after_a_match_and_what_before(count):
    memory, rows = tape(strength=400.0, key_dtype="float32"), rows_of(count)
    state = memory.absorb(memory.empty(), rows)
    first = max(0, count - N)
    query = rows.keys_NK[None, first + 2 : first + 3]
    after = memory.replay(state, query, 9)
    expected = rows.tokens_N[first + 2 :].tolist()
    assert after.tokens_QS[0, 0].tolist() == expected + [-1] * (9 - len(expected))
    assert torch.allclose(after.values_QSV[0, 0, : len(expected)], rows.values_NV[first + 2 :], atol=1e-4)
    assert torch.allclose(after.mass_QS[0, 0, len(expected) :], torch.zeros(9 - len(expected)), atol=1e-4)
    before = memory.replay(state, query, 4, "backward")
    assert before.tokens_QS[0, 0].tolist() == [*rows.tokens_N[first : first + 3].flip(0).tolist(), -1]


def test_a_replay_from_an_empty_tape_finds_nothing():
    memory = tape()
    found = memory.replay(memory.empty(), rows_of(2).keys_NK[None], 3)
    assert (found.tokens_QS == -1).all()
    assert not found.mass_QS.any()
    assert not found.values_QSV.any()


def test_a_soft_match_replays_as_the_read_modes_do_and_sharper_when_asked():
    rows = rows_of(7)
    blurred, sharp = tape(strength=2.0), tape(strength=2.0, sharpness=4.0)
    state = blurred.absorb(blurred.empty(), rows)
    query = rows.keys_NK[None, 1:2]
    found = blurred.replay(state, query, 2)
    weights = blurred.log_weights(state, query).exp()
    link = blurred.dense(state)["link"]
    assert torch.allclose(found.values_QSV[:, :, 1], weights @ link.mT @ state["value"], atol=1e-6)
    own = rows.values_NV[2]
    far, near = (m.replay(state, query, 2).values_QSV[0, 0, 1] / found.mass_QS[0, 0, 1] for m in (blurred, sharp))
    assert (near - own).norm() < (far - own).norm()


def test_a_full_tape_frees_its_oldest_slot_and_loses_no_new_row():
    memory, rows = tape(), rows_of(30)
    state = memory.empty()
    for row in range(30):
        state = memory.absorb(state, pick(rows, slice(row, row + 1)))
        found = memory.lookup(state, rows.keys_NK[row : row + 1], 1)
        assert found.tokens_Qk[0, 0] == rows.tokens_N[row]
    assert sorted(state["token"][0].tolist()) == rows.tokens_N[-N:].tolist()


def test_scores_are_logarithms_of_the_content_weighting():
    memory, rows = tape(), rows_of(5)
    state = memory.absorb(memory.empty(), rows)
    found = memory.lookup(state, rows.keys_NK, 8)
    assert torch.allclose(found.scores_Qk.exp().sum(1), torch.ones(5))
    weights = torch.softmax(16.0 * rows.keys_NK @ rows.keys_NK.T, -1)
    assert torch.allclose(found.scores_Qk[:, :5].exp(), weights.sort(descending=True).values, atol=1e-4)
    assert torch.allclose(found.values_QV, weights @ rows.values_NV, atol=1e-4)


@pytest.mark.parametrize("key_dtype", ["bfloat16", "int8"])
def test_short_keys_are_found_again(key_dtype):
    memory, rows = Dnc(Dims(64, 0), DncOptions(key_dtype=key_dtype), 2**20), rows_of(1, 0)
    keys = normalize(torch.randn(300, 64), dim=-1)
    number = torch.arange(300)
    state = memory.absorb(memory.empty(), EncodedRows(keys, number, None, number, number, number))
    assert torch.equal(memory.lookup(state, keys, 1).tokens_Qk[:, 0], number)
    assert rows.values_NV is None


def test_gradients_flow_through_a_tape():
    memory, rows = tape(), rows_of(11)
    values = rows.values_NV[None].requires_grad_()
    keys = rows.keys_NK[None].clone().requires_grad_()
    state = memory.write(memory.init_state(1), keys, values, rows.tokens_N[None])
    memory.read(state, rows.keys_NK[None], 1).values_BQV.square().sum().backward()
    for given in (keys, values):
        assert given.grad[0, -N:].abs().amax(-1).min() > 0
        assert not given.grad[0, :-N].any()


def test_a_budget_gives_as_many_slots_as_it_pays_for_and_refuses_too_few():
    memory = Dnc(Dims(100, 0), DncOptions(), 150_000)
    assert memory.slots < 4096
    assert 149_000 < memory.nbytes(memory.empty()) <= 150_000
    with pytest.raises(InvalidSpec, match=r"budget_bytes=4096 leaves a dnc bank \d+ slots of 408 bytes; it needs 16"):
        Dnc(Dims(100, 0), DncOptions(), 4096)


def test_bad_rows_are_refused():
    memory = tape()
    with pytest.raises(InvalidTrace, match="vectors of width 4"):
        memory.absorb(memory.empty(), rows_of(2, 0))
    rows = rows_of(2)
    with pytest.raises(InvalidTrace, match=f"token id {2**31}"):
        memory.absorb(
            memory.empty(), EncodedRows(rows.keys_NK, rows.tokens_N + 2**31 - 101, *list(vars(rows).values())[2:])
        )


def test_tapes_are_not_merged():
    with pytest.raises(Unsupported, match="no common order"):
        tape().merge([tape().empty()])


@pytest.mark.parametrize("options", [{}, {"masked": True, "deallocate": True, "sharp": True}])
def test_a_cell_carries_on_where_its_state_left_off(options):
    cell = DncCell(3, 2, slots=6, word=5, heads=2, hidden=7, **options)
    inputs = torch.randn(4, 9, 3)
    whole, _ = cell(inputs)
    first, state = cell(inputs[:, :4])
    rest, _ = cell(inputs[:, 4:], state)
    assert torch.equal(torch.cat([first, rest], 1), whole)
    whole.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in cell.parameters())
