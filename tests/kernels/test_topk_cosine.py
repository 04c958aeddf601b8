"""Search: exact whatever the packing, the pass that picks candidates, and the order of rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from raymem.errors import ConfigError, InvalidInput
from raymem.kernels.topk_cosine import coarse_scores, topk_cosine, topk_cosine_reference
from raymem.memory.quantize import STORED, pack, unpack

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
    faiss, neighbors = pytest.importorskip("faiss"), pytest.importorskip("sklearn.neighbors")
    rows, scale, order = rows_of(2000, 100, "float32")
    unit, asked = unpack(rows, scale), queries_of(17, 100)
    scores, index = topk_cosine(asked, rows, scale, order, 10)
    flat = faiss.IndexFlatL2(100)
    flat.add(unit.numpy())
    # faiss returns squared distances: |a - b|^2 = 2 - 2 cos for unit vectors
    squared, found = flat.search(asked.numpy(), 10)
    assert np.array_equal(index.numpy(), found)
    np.testing.assert_allclose(scores.numpy(), 1 - squared / 2, atol=2e-6)
    brute = neighbors.NearestNeighbors(n_neighbors=10, algorithm="brute").fit(unit.numpy())
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
    got, error = coarse_scores(asked, rows, scale)
    exact = asked.double() @ (rows.double() * scale.double()[:, None]).T
    assert bool(((got - exact).abs() <= error[:, None]).all())
    # a bound that is never approached would send every query to the slow path
    assert float(error.max()) < 0.01


def on(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


SIZES = [(1, 1, 1, 1), (63, 100, 3, 7), (100, 63, 2, 60), (300, 131, 2, 32), (3000, 576, 70, 5)]


@pytest.mark.parametrize("masked", [None, "bank", "query"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width", "queries", "k"), SIZES)
def test_triton_search_equals_the_reference_bitwise(dtype, count, width, queries, k, masked, device):
    rows, scale, _ = rows_of(count, width, dtype)
    if device == "cpu" and count > 1000:
        pytest.skip("the interpreter takes minutes for it")
    # a cluster, as neighbours in a text are: many scores lie close together
    rows[::3], scale[::3] = rows[0].clone(), scale[0].clone()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    shape = {None: None, "bank": (count,), "query": (queries, count)}[masked]
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    asked = queries_of(queries, width)
    expected = topk_cosine_reference(asked, rows, scale, order, k, mask)
    asked, rows, scale, order, mask = on(device, asked, rows, scale, order, mask)
    for backend in ("triton", "torch"):
        scores, index = topk_cosine(asked, rows, scale, order, k, mask=mask, backend=backend)
        # bitwise the CPU's, wherever it ran: the scores are added up in one order
        assert torch.equal(scores.cpu(), expected[0])
        assert torch.equal(index.cpu(), expected[1])


def test_triton_search_answers_equal_rows_in_order_even_when_more_than_it_collects(device):
    rows, scale, _ = rows_of(1, 63, "bfloat16")
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(2))
    asked, rows, scale, order = on(device, queries_of(2, 63), rows.expand(1500, -1), scale.expand(1500), order)
    _, index = topk_cosine(asked, rows, scale, order, 5, backend="triton")
    assert order[index].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("masked", [None, "bank", "query"])
def test_triton_search_of_some_queries_at_a_time_equals_the_reference(masked, device, monkeypatch):
    from raymem.kernels.topk_cosine import triton as kernels

    monkeypatch.setattr(kernels, "_SCORES_AT_ONCE", 2 * 777)
    rows, scale, order = rows_of(777, 63, "int8")
    shape = {None: None, "bank": (777,), "query": (5, 777)}[masked]
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    expected = topk_cosine_reference(queries_of(5, 63), rows, scale, order, 9, mask)
    asked, rows, scale, order, mask = on(device, queries_of(5, 63), rows, scale, order, mask)
    got = topk_cosine(asked, rows, scale, order, 9, mask=mask, backend="triton")
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])


@pytest.mark.parametrize("near", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rough_scores_of_triton_stay_within_their_own_bound(dtype, near, device):
    from raymem.kernels.topk_cosine import triton as kernels

    asked = queries_of(20, 576)
    # rows beside a query have terms of one sign, whose rounding adds up
    drawn = torch.randn(500, 576, generator=torch.Generator().manual_seed(0)) + near * asked[0] * 24
    (rows, scale), exact_bound = pack(drawn, STORED[dtype]), kernels.bound(576, STORED[dtype])
    exact = asked.double() @ (rows.double() * scale.double()[:, None]).T
    found = kernels.coarse_pass(*on(device, asked, rows, scale))[0]
    got, peaks = found[:, :500], found[:, 512:]
    error = float((got.cpu() - exact).abs().max())
    assert error <= exact_bound
    # a bound that is never approached would collect rows for nothing
    assert exact_bound < 5e-4
    groups = torch.nn.functional.pad(got, (0, -500 % 16), value=float("-inf")).unflatten(1, (-1, 16))
    assert torch.equal(peaks, groups.amax(2))


def test_a_triton_kernel_that_drops_rows_would_be_caught(device, monkeypatch):
    # the comparison above must be able to fail: a rough pass that misses some rows is seen
    from raymem.kernels.topk_cosine import triton as kernels

    sound = kernels.coarse_pass

    def broken(*operands):
        scores, *rest = sound(*operands)
        scores[:, :100:2] = float("-inf")
        return scores, *rest

    monkeypatch.setattr(kernels, "coarse_pass", broken)
    rows, scale, order = rows_of(100, 63, "float32")
    expected = topk_cosine_reference(queries_of(3, 63), rows, scale, order, 7)
    got = topk_cosine(*on(device, queries_of(3, 63), rows, scale, order), 7, backend="triton")
    assert not torch.equal(got[1].cpu(), expected[1])


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_rough_scores_know_how_torch_was_told_to_multiply(dtype, precision, device):
    rows, scale, _ = rows_of(500, 257, dtype)
    asked = queries_of(20, 257)
    exact = asked.double() @ (rows.double() * scale.double()[:, None]).T
    torch.set_float32_matmul_precision(precision)
    try:
        got, error = coarse_scores(*on(device, asked, rows, scale))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert bool(((got.cpu() - exact).abs() <= error.cpu()[:, None]).all())


def test_search_refuses_what_does_not_fit():
    rows, scale, order = rows_of(10, 8, "float32")
    with pytest.raises(InvalidInput, match=r"\[2, 9\] and rows \[10, 8\]"):
        topk_cosine(queries_of(2, 9), rows, scale, order, 3)
    with pytest.raises(InvalidInput, match=r"mask is \[3\]"):
        topk_cosine(queries_of(2, 8), rows, scale, order, 3, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="'cuda' is unknown"):
        topk_cosine(queries_of(2, 8), rows, scale, order, 3, backend="cuda")
