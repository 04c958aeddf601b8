"""Weights summed by token."""

import pytest
import torch

from raymem.kernels.vocab_scatter import vocab_scatter


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_pair_stored_more_often_has_that_much_more_mass(backend, device):
    # J3: equal distances, stored a and b times -> a / (a + b)
    tokens = torch.tensor([[7, 7, 7, 40_000, 40_000, -1, -1]], device=device)
    weights = torch.softmax(torch.where(tokens >= 0, 0.5, float("-inf")), 1)
    found = vocab_scatter(tokens, weights, 50_000, backend=backend)
    assert found[0, 7].item() == pytest.approx(3 / 5, abs=1e-7)
    # 40,000 is over what 16 bits can hold
    assert found[0, 40_000].item() == pytest.approx(2 / 5, abs=1e-7)
    assert found.sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("queries", "k", "vocabulary"), [(1, 1, 1), (5, 63, 100), (3, 100, 257)])
def test_triton_equals_the_reference_forward_and_backward(queries, k, vocabulary, device):
    generator = torch.Generator().manual_seed(k)
    tokens = torch.randint(-1, vocabulary, (queries, k), generator=generator).to(device)
    grads, outs = [], []
    for backend in ("torch", "triton"):
        weights = torch.rand(queries, k, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        out = vocab_scatter(tokens, weights, vocabulary, backend=backend)
        (out * torch.arange(vocabulary, device=device)).sum().backward()
        outs.append(out.detach())
        grads.append(weights.grad)
    # float32 sums in another order over at most 100 weights below 1
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(grads[0], grads[1])


def test_no_neighbours_are_no_mass():
    assert vocab_scatter(torch.full((2, 3), -1), torch.ones(2, 3), 9).abs().max() == 0
    assert vocab_scatter(torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0), 9).shape == (2, 9)
