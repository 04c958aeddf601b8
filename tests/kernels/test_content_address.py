"""Content weightings and links against their definitions, one number at a time."""

import pytest
import torch

from raymem.kernels.content_address import content_address
from raymem.kernels.link_update import link_update

B, N, H, W = 2, 7, 3, 5


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, N, W).double(), torch.randn(B, H, W).double(), 5 * torch.rand(B, H).double()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_content_address_is_a_softmax_of_scaled_cosines(masked, hidden):
    memory, keys, strength = operands()
    mask = torch.rand(B, H, W).double() if masked else torch.ones(B, H, W).double()
    held = torch.rand(B, N) > 0.4 if hidden else torch.ones(B, N, dtype=torch.bool)
    found = content_address(memory, keys, strength, mask if masked else None, held if hidden else None)
    for b in range(B):
        for h in range(H):
            grown = torch.zeros(N).double()
            for n in range(N):
                key, slot = keys[b, h] * mask[b, h], memory[b, n] * mask[b, h]
                grown[n] = held[b, n] * torch.exp(strength[b, h] * (key @ slot) / (key.norm() * slot.norm() + 1e-6))
            assert torch.allclose(found[b, h], grown / grown.sum(), atol=1e-14)


def test_nothing_held_gives_weights_of_zero_and_no_nan_in_gradients():
    memory, keys, strength = (x.requires_grad_() for x in operands())
    held = torch.zeros(B, N, dtype=torch.bool)
    held[1] = True
    found = content_address(memory, keys, strength, None, held)
    assert not found[0].any()
    assert torch.allclose(found[1].sum(-1), torch.ones(H).double())
    found.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (memory, keys, strength))


def test_slots_of_zeros_are_at_cosine_zero():
    keys, strength = operands()[1:]
    memory = torch.zeros(B, N, W).double().requires_grad_()
    found = content_address(memory, keys, strength)
    assert torch.allclose(found, torch.full_like(found, 1 / N))
    found[0, 0, 0].backward()
    assert torch.isfinite(memory.grad).all()


def test_content_address_gradients():
    assert torch.autograd.gradcheck(content_address, [x.requires_grad_() for x in operands()])
    mask = torch.rand(B, H, W).double().requires_grad_()
    assert torch.autograd.gradcheck(content_address, [*(x.requires_grad_() for x in operands()), mask])


def test_link_update_is_its_definition():
    link, precedence, weights = (
        (torch.rand(B, N, N) / N).double(),
        torch.rand(B, N).double(),
        torch.rand(B, N).double() / N,
    )
    found, after = link_update(link, precedence, weights)
    for b in range(B):
        for i in range(N):
            for j in range(N):
                kept = (1 - weights[b, i] - weights[b, j]) * link[b, i, j] + weights[b, i] * precedence[b, j]
                assert torch.isclose(found[b, i, j], kept * (i != j), atol=1e-15)
        assert torch.allclose(after[b], (1 - weights[b].sum()) * precedence[b] + weights[b])


def test_link_update_gradients():
    inputs = [torch.rand(B, N, N).double(), torch.rand(B, N).double(), torch.rand(B, N).double() / N]
    assert torch.autograd.gradcheck(link_update, [x.requires_grad_() for x in inputs])
