"""Sums of products against their definition, and without any rounding on the grid."""

import pytest
import torch

from raymem.kernels.rls_update import information_update, information_update_reference, leverage, ridge_factor, to_grid

B, T, S, V = 3, 37, 11, 5


def operands() -> list[torch.Tensor]:
    weights = to_grid(torch.randn(B, T, S, dtype=torch.float64))
    return [torch.zeros(B, S, S).double(), torch.zeros(B, S, V).double(), weights, torch.randn(B, T, V).double()]


def test_update_in_place_equals_the_reference():
    gram, cross, weights, values = operands()
    expected = information_update_reference(gram, cross, weights, values, -1.0)
    with torch.no_grad():
        found = information_update(gram, cross, weights, values, -1.0)
    assert found[0] is gram
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-12)


def test_gradients_are_those_of_the_sums():
    gram, cross, weights, values = operands()
    inputs = [x[:1, :4].clone().requires_grad_() for x in (weights, values)]
    assert torch.autograd.gradcheck(lambda w, z: information_update(gram[:1], cross[:1], w, z), inputs)


def test_sums_on_the_grid_do_not_depend_on_order():
    gram, cross, weights, _ = operands()
    ones = torch.ones(B, T, V, dtype=torch.float64)
    whole = information_update_reference(gram, cross, weights, ones)
    order = torch.randperm(T)
    for part in order.split(5):
        gram, cross = information_update_reference(gram, cross, weights[:, part], ones[:, part])
    assert torch.equal(gram, whole[0])
    assert torch.equal(cross, whole[1])


def test_off_the_grid_order_shows():
    weights = torch.randn(B, 999, S, dtype=torch.float64)
    sums = [(w.mT @ w) for w in (weights, weights.flip(1))]
    assert not torch.equal(*sums)


def test_the_grid_is_fine_and_lets_gradients_through():
    weights = torch.randn(100, dtype=torch.float64, requires_grad=True)
    rounded = to_grid(weights)
    assert (rounded - weights).abs().max() <= 2.0**-17
    rounded.sum().backward()
    assert torch.equal(weights.grad, torch.ones_like(weights))


@pytest.mark.parametrize("rows", [6, 37])
def test_leverage_is_at_most_one_for_rows_that_are_in_the_sums(rows):
    gram, cross, weights, values = operands()
    weights, values = weights[:, :rows], values[:, :rows]
    gram, cross = information_update_reference(gram, cross, weights, values)
    factor = ridge_factor(gram, 1e-9)
    left = (values.square().sum((1, 2)) - (cross * torch.cholesky_solve(cross, factor)).sum((1, 2))).clamp_min(1e-12)
    part = leverage(factor, cross, weights[:, :3], values[:, :3], left)
    assert torch.linalg.eigvalsh(part).amax() < 1 + 1e-5
    if rows < S:
        strange = leverage(factor, cross, weights[:, :3].roll(1, 2), values[:, :3], left)
        assert torch.linalg.eigvalsh(strange).amin(0).amax() > 1
