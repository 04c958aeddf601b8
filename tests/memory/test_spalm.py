"""SPALM's datastore, its search against peers, and the paper's gated read (mechanisms.md section 7)."""

import faiss
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from raymem.errors import Corrupt, InvalidTrace
from raymem.kernels.vocab_scatter import vocab_scatter
from raymem.memory import build
from raymem.memory.base import Dims, EncodedRows
from raymem.memory.spalm import SpalmGate, token_memory

KEY = 24


def bank(budget=10**6, value=0, **options):
    return build("spalm", Dims(KEY, value), options, budget)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_search_through_a_bank_finds_what_faiss_finds(rows_of):
    memory = bank(key_dtype="float32")
    rows, queries = rows_of(700, key=KEY), rows_of(20, 5000, key=KEY).keys_NK
    found = memory.lookup(memory.absorb(memory.empty(), rows), queries, 16)
    flat = faiss.IndexFlatIP(KEY)
    flat.add(rows.keys_NK.numpy())
    cosines, index = flat.search(queries.numpy(), 16)
    assert np.array_equal(found.pos_Qk.numpy(), index)
    np.testing.assert_allclose(found.scores_Qk.numpy(), cosines, atol=1e-6)
    np.testing.assert_allclose(found.similarity_Q.numpy(), cosines[:, 0], atol=1e-6)


def test_neighbours_say_who_wrote_them(rows_of):
    rows = rows_of(50, 1000, key=KEY)
    memory = bank()
    found = memory.lookup(memory.absorb(memory.empty(), rows), rows.keys_NK, 1)
    assert torch.equal(found.pos_Qk[:, 0], rows.pos_N)
    assert torch.equal(found.seq_Qk[:, 0], rows.seq_N)
    assert torch.equal(found.source_Qk[:, 0], rows.source_N)
    assert torch.equal(found.tokens_Qk[:, 0], rows.tokens_N)


def test_at_capacity_the_oldest_rows_go_and_no_lookup_is_wrong_afterwards(rows_of):
    # a peer resets its index at the first overflow but keeps counting, so that every later lookup is wrong
    memory = bank(budget=100 * 80)
    state = memory.empty()
    room = memory.capacity
    assert 80 <= room <= 110
    for start in range(0, 5 * room, 37):
        state = memory.absorb(state, rows_of(37, start, key=KEY))
    end = start + 37
    kept = rows_of(room, end - room, key=KEY)
    found = memory.lookup(state, kept.keys_NK, 1)
    assert torch.equal(found.pos_Qk[:, 0], kept.pos_N)
    assert torch.equal(found.tokens_Qk[:, 0], kept.tokens_N)
    gone = rows_of(20, end - room - 20, key=KEY)
    assert not torch.isin(memory.lookup(state, gone.keys_NK, 1).pos_Qk, gone.pos_N).any()
    # one write larger than the whole bank leaves its end
    state = memory.absorb(state, rows_of(3 * room, end, key=KEY))
    assert state.held()["pos"].min() == end + 2 * room


def test_growing_copies_rows_a_bounded_number_of_times(rows_of):
    memory, copied = bank(), 0
    state = memory.empty()
    for start in range(0, 3000, 10):
        before = len(state.columns["pos"])
        state = memory.absorb(state, rows_of(10, start, key=KEY))
        copied += state.count - 10 if len(state.columns["pos"]) != before else 0
    assert copied < 2 * 3000


def test_a_bank_grows_into_the_room_behind_what_was_loaded_and_copies_what_has_none(rows_of):
    memory = bank()
    dumped = memory.dump(memory.absorb(memory.empty(), rows_of(800, key=KEY)))
    roomy = {
        name: torch.cat([t.reshape(len(t), -1)] * 2)[: len(t)].reshape(t.shape) for name, t in dumped.items() if t.ndim
    }
    one, two = memory.load(roomy | {"head": dumped["head"]}), memory.load(dumped)
    for state, tensors, kept in ((one, roomy, True), (two, dumped, False)):
        assert all((state.columns[name].data_ptr() == t.data_ptr()) == kept for name, t in tensors.items() if t.ndim)
        grown = memory.absorb(state, rows_of(100, 800, key=KEY))
        assert same(memory.dump(grown), memory.dump(memory.absorb(memory.empty(), rows_of(900, key=KEY))))


def test_a_mask_hides_rows_inside_the_search(rows_of):
    memory, rows = bank(), rows_of(60, key=KEY)
    state = memory.absorb(memory.empty(), rows)
    mine = state.held()["source"] == 1
    found = memory.lookup(state, rows.keys_NK, 20, mask=mine)
    # 20 of the 60 rows are mine, and all 20 are found whatever the others' scores
    assert bool((found.source_Qk == 1).all())


def test_forgetting_rows_leaves_what_never_having_seen_them_would(rows_of):
    memory, rows = bank(), rows_of(300, key=KEY)
    erased = rows.source_N == 2
    state = memory.forget(memory.absorb(memory.empty(), rows), rows.pos_N[erased])
    kept = EncodedRows(*(None if part is None else part[~erased] for part in vars(rows).values()))
    never = memory.absorb(memory.empty(), kept)
    assert same(memory.dump(state), memory.dump(never))
    more = rows_of(40, 300, key=KEY)
    assert same(memory.dump(memory.absorb(state, more)), memory.dump(memory.absorb(never, more)))
    nothing = memory.forget(never, torch.tensor([], dtype=torch.int64))
    assert same(memory.dump(nothing), memory.dump(never))


def test_forgetting_in_a_full_ring_keeps_the_order_of_eviction(rows_of):
    memory = bank(budget=100 * 80)
    room = memory.capacity
    state = memory.absorb(memory.empty(), rows_of(room + 30, key=KEY))
    state = memory.forget(state, torch.arange(40, 50))
    assert state.count == room - 10
    state = memory.absorb(state, rows_of(15, room + 30, key=KEY))
    # ten rows fill the gap, five take the place of the oldest
    assert state.count == room
    assert sorted(state.held()["pos"].tolist()) == [*range(35, 40), *range(50, room + 45)]


def test_token_ids_over_16_bits_come_back_and_over_32_are_refused(rows_of):
    memory, rows = bank(), rows_of(3, key=KEY)
    large = EncodedRows(
        rows.keys_NK, torch.tensor([32_768, 151_935, 2**31 - 1]), None, rows.pos_N, rows.seq_N, rows.source_N
    )
    found = memory.lookup(memory.absorb(memory.empty(), large), rows.keys_NK, 1)
    assert found.tokens_Qk[:, 0].tolist() == [32_768, 151_935, 2**31 - 1]
    over = EncodedRows(rows.keys_NK, torch.full((3,), 2**31), None, rows.pos_N, rows.seq_N, rows.source_N)
    with pytest.raises(InvalidTrace, match=str(2**31)):
        memory.absorb(memory.empty(), over)


def test_vectors_are_blended_by_similarity(rows_of):
    memory, rows = bank(value=6, tau=0.1, key_dtype="float32"), rows_of(40, key=KEY, value=6)
    state = memory.absorb(memory.empty(), rows)
    query = rows_of(1, 99, key=KEY).keys_NK
    found = memory.lookup(state, query, 5)
    weights = torch.softmax(found.scores_Qk[0] / 0.1, 0)
    stored = rows.values_NV.bfloat16().float()[found.pos_Qk[0]]
    torch.testing.assert_close(found.values_QV[0], weights @ stored)


def test_packed_keys_find_nearly_the_same_neighbours(rows_of):
    rows, queries = rows_of(500, key=KEY), rows_of(40, 9000, key=KEY).keys_NK
    found = {}
    for dtype in ("float32", "bfloat16", "int8"):
        memory = bank(key_dtype=dtype)
        found[dtype] = memory.lookup(memory.absorb(memory.empty(), rows), queries, 10).pos_Qk
        exact = (found[dtype][:, :, None] == found["float32"][:, None]).any(-1).float().mean()
        # rounding moves cosines by less than 0.005 of the spacing at the tenth neighbour
        assert exact > 0.95, dtype
    assert bank(key_dtype="int8").capacity > 1.3 * bank().capacity


def test_a_damaged_ring_is_refused(rows_of):
    memory = bank(budget=100 * 80)
    dump = memory.dump(memory.absorb(memory.empty(), rows_of(20, key=KEY)))
    with pytest.raises(Corrupt, match="next slot 7"):
        memory.load(dump | {"head": torch.tensor(7)})
    with pytest.raises(Corrupt, match=r"\[19, 20\] rows"):
        memory.load(dump | {"token": dump["token"][:-1]})
    with pytest.raises(Corrupt, match="room for"):
        memory.load({n: t.repeat(10, *[1] * (t.dim() - 1)) if t.dim() else t for n, t in dump.items()})


def test_j2_neighbours_that_agree_give_their_embedding_exactly():
    embedding = torch.randn(50, 8)
    tokens = torch.full((3, 5), 17)
    tokens[1, 2:] = -1
    memory = token_memory(torch.randn(3, 8), tokens, embedding)
    torch.testing.assert_close(memory, embedding[17].expand(3, -1), rtol=1e-6, atol=1e-6)


def test_the_paper_s_read_is_attention_over_embeddings_of_retrieved_tokens():
    embedding, hidden = torch.randn(50, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    tokens = torch.tensor([[3, 9, 3, -1], [1, -1, -1, -1]])
    rows = embedding[torch.tensor([3, 9, 3])]
    expected = torch.softmax(rows @ hidden[0], 0) @ rows
    got = token_memory(hidden, tokens, embedding)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], embedding[1])


def test_an_empty_store_leaves_the_model_as_it_is_bitwise():
    gate, hidden, embedding = SpalmGate(8), torch.randn(3, 8), torch.randn(50, 8)
    tokens = torch.tensor([[-1, -1], [4, -1], [-1, -1]])
    mixed, g = gate(hidden, tokens, embedding)
    assert torch.equal(mixed[[0, 2]], hidden[[0, 2]])
    assert bool((g[[0, 2]] == 1).all())
    assert not torch.equal(mixed[1], hidden[1])


@pytest.mark.parametrize("vector", [True, False])
def test_the_gate_mixes_as_the_paper_says_and_can_be_trained(vector):
    torch.manual_seed(0)
    gate, embedding = SpalmGate(16, vector=vector), torch.randn(30, 16)
    assert gate(torch.randn(2, 16), torch.ones(2, 1, dtype=torch.int64), embedding)[1].shape == (2, 16 if vector else 1)
    # half of the states are marked as memorised: there the neighbours are right, elsewhere they mislead
    marked = torch.arange(64) % 2 == 0
    hidden, wanted = torch.randn(64, 16), torch.randint(30, (64,))
    hidden[:, 0] = torch.where(marked, 4.0, -4.0)
    neighbours = torch.where(marked, wanted, (wanted + 7) % 30)[:, None].expand(-1, 4)

    def loss():
        return cross_entropy(gate(hidden, neighbours, embedding)[0] @ embedding.T, wanted)

    optimizer, before = torch.optim.Adam(gate.parameters(), lr=0.05), loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    g = gate(hidden, neighbours, embedding)[1].mean(1)
    assert loss().item() < 0.7 * before
    assert g[marked].mean().item() < g[~marked].mean().item() - 0.2


def test_j5_with_every_row_retrieved_the_estimate_is_the_full_kernel(rows_of):
    memory, rows = bank(key_dtype="float32"), rows_of(80, key=KEY)
    queries = rows_of(6, 700, key=KEY).keys_NK
    found = memory.lookup(memory.absorb(memory.empty(), rows), queries, 200)
    got = vocab_scatter(found.tokens_Qk, torch.softmax(found.scores_Qk / 0.1, 1), 50)
    kernel = torch.softmax(queries @ rows.keys_NK.T / 0.1, 1)
    expected = torch.zeros(6, 50).index_add(1, rows.tokens_N, kernel)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(6))


def test_projection_keeps_cosines_and_is_the_same_for_every_bank():
    keys = normalize(torch.randn(300, 128), dim=1)
    one, two = (build("spalm", Dims(128, 0), {"key_dims": 96}, 10**6).project(keys) for _ in range(2))
    assert torch.equal(one, two)
    other = build("spalm", Dims(128, 0), {"key_dims": 96, "projection_seed": 1}, 10**6).project(keys)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(300))
    # dropping 32 of 128 dimensions at random leaves cosines within sqrt(32 / 128 / 96) = 0.05, one standard deviation
    assert float((one @ one.T - keys @ keys.T).std()) < 0.08
    # rows don't depend on their neighbours
    assert all(torch.equal(one[i : i + n], torch_projected(keys[i : i + n])) for i, n in ((0, 1), (7, 5), (3, 200)))


def torch_projected(keys):
    return build("spalm", Dims(128, 0), {"key_dims": 96}, 10**6).project(keys)
