"""Search: exact whatever the packing, the pass that picks candidates, and the order of rows."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from raymem.errors import ConfigError, InvalidInput
from raymem.kernels.topk_cosine import coarse, topk_cosine, topk_cosine_reference
from raymem.memory.packing import STORED, pack, unpack

DTYPES = sorted(STORED)


def rows_of(count, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, scale = pack(torch.randn(count, width, generator=generator), STORED[dtype])
    return rows, scale, torch.arange(count)


def queries_of(count, width, seed=1):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width", "queries", "k"), [(1, 1, 1, 1), (63, 100, 3, 7), (1000, 257, 5, 32)])
def test_fast_search_equals_the_reference_bitwise(dtype, count, width, queries, k):
    rows, scale, order = rows_of(count, width, dtype)
    asked = queries_of(queries, width)
    expected = topk_cosine_reference(asked, rows, scale, order, k)
    scores, index = topk_cosine(asked, rows, scale, order, k)
    assert torch.equal(scores, expected[0])
    assert torch.equal(index, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_search_in_several_blocks_equals_the_reference(dtype, monkeypatch):
    monkeypatch.setattr("raymem.kernels.topk_cosine._BLOCK_ROWS", 100)
    rows, scale, order = rows_of(777, 63, dtype)
    asked = queries_of(9, 63)
    got, expected = topk_cosine(asked, rows, scale, order, 11), topk_cosine_reference(asked, rows, scale, order, 11)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_float32_search_finds_what_faiss_and_sklearn_find():
    rows, scale, order = rows_of(2000, 100, "float32")
    unit, asked = unpack(rows, scale), queries_of(17, 100)
    scores, index = topk_cosine(asked, rows, scale, order, 10)
    flat = faiss.IndexFlatL2(100)
    flat.add(unit.numpy())
    # faiss returns squared distances: |a - b|^2 = 2 - 2 cos for unit vectors
    squared, found = flat.search(asked.numpy(), 10)
    assert np.array_equal(index.numpy(), found)
    np.testing.assert_allclose(scores.numpy(), 1 - squared / 2, atol=2e-6)
    brute = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(unit.numpy())
    assert np.array_equal(index.numpy(), brute.kneighbors(asked.numpy(), return_distance=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_come_in_their_order_even_when_more_than_the_candidates(dtype):
    one = pack(queries_of(1, 63, seed=3), STORED[dtype])
    rows, scale = one[0].expand(500, -1).contiguous(), one[1].expand(500).contiguous()
    order = torch.randperm(500)
    _, index = topk_cosine(queries_of(2, 63), rows, scale, order, 5)
    assert order[index].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_hidden_inside_the_search(dtype):
    rows, scale, order = rows_of(400, 63, dtype)
    asked = queries_of(4, 63)
    best = topk_cosine(asked, rows, scale, order, 50)[1]
    mask = torch.ones(4, 400, dtype=torch.bool).scatter(1, best, False)
    scores, index = topk_cosine(asked, rows, scale, order, 50, mask=mask)
    # after top-k nothing would be left: inside the search the next 50 come up
    assert bool((index >= 0).all())
    assert not bool((index[:, :, None] == best[:, None]).any())
    assert torch.equal(scores, topk_cosine_reference(asked, rows, scale, order, 50, mask)[0])
    assert topk_cosine(asked, rows, scale, order, 3, mask=torch.zeros(400, dtype=torch.bool))[1].max() == -1


def test_merged_shards_equal_one_search():
    rows, scale, order = rows_of(300, 64, "int8")
    rows[200:] = rows[:100]
    scale[200:] = scale[:100]
    asked = queries_of(6, 64)
    whole = topk_cosine(asked, rows, scale, order, 20)
    parts = [topk_cosine(asked, rows[s], scale[s], order[s], 20) for s in (slice(0, 170), slice(170, 300))]
    scores = torch.cat([parts[0][0], parts[1][0]], 1)
    index = torch.cat([parts[0][1], parts[1][1] + 170], 1)
    by_order = index.argsort(dim=1)
    best = scores.gather(1, by_order).argsort(dim=1, descending=True, stable=True)[:, :20]
    assert torch.equal(index.gather(1, by_order).gather(1, best), whole[1])
    assert torch.equal(scores.gather(1, by_order).gather(1, best), whole[0])


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 90), width=st.integers(1, 70), k=st.integers(0, 60), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99), copies=st.integers(1, 3),
)  # fmt: skip
def test_any_search_equals_the_reference(count, width, k, dtype, seed, copies):
    rows, scale, _ = rows_of(count, width, dtype, seed)
    rows, scale = rows.repeat(copies, 1), scale.repeat(copies)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    asked = queries_of(3, width, seed)
    got, expected = topk_cosine(asked, rows, scale, order, k), topk_cosine_reference(asked, rows, scale, order, k)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_coarse_scores_stay_within_their_own_bound(dtype):
    rows, scale, _ = rows_of(500, 257, dtype)
    asked = queries_of(20, 257)
    got, error = coarse.coarse_scores(asked, rows, scale)
    exact = asked.double() @ (rows.double() * scale.double()[:, None]).T
    assert bool(((got - exact).abs() <= error[:, None]).all())
    # a bound that is never approached would send every query to the slow path
    assert float(error.max()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_scores_equal_plain_ones(dtype):
    rows, scale, order = rows_of(100, 63, dtype)
    asked = queries_of(3, 63)
    got = topk_cosine(asked, rows, scale, order, 7, backend="triton")
    expected = topk_cosine_reference(asked, rows, scale, order, 7)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_a_triton_kernel_that_drops_rows_would_be_caught(monkeypatch):
    # the comparison above must be able to fail: a scoring pass that misses some rows and claims no error is seen
    from raymem.kernels.topk_cosine import triton as kernels

    sound = kernels.topk_cosine_scores

    def broken(queries, rows, scale):
        scores, error = sound(queries, rows, scale)
        scores[:, ::2] = -1.0
        return scores, error

    monkeypatch.setattr(kernels, "topk_cosine_scores", broken)
    rows, scale, order = rows_of(100, 63, "float32")
    asked = queries_of(3, 63)
    got = topk_cosine(asked, rows, scale, order, 7, backend="triton")
    assert not torch.equal(got[1], topk_cosine_reference(asked, rows, scale, order, 7)[1])


def test_search_refuses_what_does_not_fit():
    rows, scale, order = rows_of(10, 8, "float32")
    with pytest.raises(InvalidInput, match=r"\[2, 9\] and rows \[10, 8\]"):
        topk_cosine(queries_of(2, 9), rows, scale, order, 3)
    with pytest.raises(InvalidInput, match=r"mask is \[3\]"):
        topk_cosine(queries_of(2, 8), rows, scale, order, 3, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="'cuda' is unknown"):
        topk_cosine(queries_of(2, 8), rows, scale, order, 3, backend="cuda")
