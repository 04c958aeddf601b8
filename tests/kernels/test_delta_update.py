"""The Titans recurrence: token by token, by chunk, and in Triton, forward and backward."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from raymem.kernels.delta_update import (
    chunk_delta_update,
    recurrent_delta_update,
    recurrent_delta_update_reference,
    transition,
)

SHAPES = [pytest.param(1, 1, 1, 1, id="B1-T1-K1-V1"), pytest.param(2, 9, 5, 3, id="B2-T9-K5-V3"),
          pytest.param(1, 20, 63, 100, id="B1-T20-K63-V100")]  # fmt: skip


def rms_ratio(reference, got):
    assert reference.shape == got.shape
    assert bool(torch.isfinite(got).all()), "a lane was not written"
    spread = (reference.double() - got.double()).square().mean().sqrt()
    return float(spread / reference.double().square().mean().sqrt().clamp_min(1e-12))


def inputs(banks, steps, key, value, *, momentum=True, dtype=torch.float64, grad=False, device="cpu"):
    generator = torch.Generator().manual_seed(banks * 1000 + steps)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight, keys = drawn(banks, key, value), normalize(drawn(banks, steps, key), dim=-1)
    gates = tuple(torch.sigmoid(drawn(banks, steps) - shift) for shift in (0.0, 0.5, 3.0))
    tensors = [weight, drawn(banks, key, value) if momentum else None, keys, drawn(banks, steps, value), *gates]
    if not momentum:
        tensors[5] = torch.zeros_like(gates[1])
    tensors = [None if x is None else x.to(device) for x in tensors]
    if grad:
        tensors = [None if x is None else x.requires_grad_() for x in tensors]
    weight, moment, keys, values, *gates = tensors
    return weight, moment, keys, values, tuple(gates)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(("banks", "steps", "key", "value"), SHAPES)
def test_chunk_form_equals_the_recurrence(banks, steps, key, value, momentum):
    weight, moment, keys, values, gates = inputs(banks, steps, key, value, momentum=momentum)
    expected = recurrent_delta_update_reference(weight, moment, keys, values, gates)
    got = chunk_delta_update(weight, moment, keys, values, gates[0], transition(*gates[1:]))
    for a, b in zip(expected, got, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_active_change_nothing_in_either_form():
    weight, moment, keys, values, gates = inputs(2, 9, 5, 3)
    active = torch.zeros(2, 9, dtype=torch.bool)
    active[0, [0, 3, 4, 8]] = True
    short = [x[:1, [0, 3, 4, 8]] for x in (keys, values, *gates)]
    expected = recurrent_delta_update_reference(weight[:1], moment[:1], short[0], short[1], tuple(short[2:]))
    loop = recurrent_delta_update(weight, moment, keys, values, gates, active)
    block = chunk_delta_update(weight, moment, keys, values, gates[0] * active, transition(*gates[1:], active))
    for got in (loop, block):
        for i in range(2):
            torch.testing.assert_close(got[i][:1], expected[i], rtol=1e-12, atol=1e-12)
        assert torch.equal(got[0][1], weight[1])
        assert torch.equal(got[1][1], moment[1])


@pytest.mark.parametrize("momentum", [True, False])
def test_gradients_of_both_forms_are_right(momentum):
    weight, moment, keys, values, gates = inputs(1, 4, 3, 2, momentum=momentum, grad=True)

    def loop(*x):
        return [y for y in recurrent_delta_update(x[0], moment, x[1], x[2], x[3:]) if y is not None]

    def block(*x):
        found = chunk_delta_update(x[0], moment, x[1], x[2], x[3], transition(*x[4:]))
        return [y for y in found if y is not None]

    assert torch.autograd.gradcheck(loop, (weight, keys, values, *gates))
    assert torch.autograd.gradcheck(block, (weight, keys, values, *gates))


def test_without_momentum_and_decay_it_is_the_wy_form_of_the_delta_rule():
    weight, _, keys, values, gates = inputs(1, 20, 12, 7, momentum=False)
    zero = torch.zeros_like(gates[0])
    got, _, _ = recurrent_delta_update(weight, None, keys, values, (gates[0], zero, zero))
    b, k, m = torch.diag(2 * gates[0][0]), keys[0], weight[0]
    solved = torch.linalg.solve(torch.eye(20, dtype=k.dtype) + torch.tril(b @ k @ k.T, -1), b)
    torch.testing.assert_close(got[0], m + k.T @ (solved @ (values[0] - k @ m)), rtol=1e-12, atol=1e-12)


def test_transition_is_the_closed_form_for_gradients_taken_at_the_start():
    _, _, _, _, (_, eta, alpha) = inputs(1, 6, 2, 2)
    moves, beta = transition(eta, alpha), (1 - alpha[0]).cumprod(0)
    for t in range(6):
        expected = sum(float(beta[5] / beta[j]) * math.prod(eta[0, t + 1 : j + 1].tolist()) for j in range(t, 6))
        assert float(moves.into_weight_BTI[0, 5, 1 + t]) == pytest.approx(expected, abs=1e-13)
    assert float(moves.decay_BT[0, 5]) == pytest.approx(float(beta[5]), abs=1e-15)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(("banks", "steps", "key", "value"), SHAPES)
def test_triton_equals_the_reference_forward_and_backward(banks, steps, key, value, momentum, masked, device):
    runs = []
    for backend in ("torch", "triton"):
        weight, moment, keys, values, gates = inputs(
            banks, steps, key, value, momentum=momentum, dtype=torch.float32, grad=True, device=device
        )
        active = (torch.arange(steps, device=device) % 3 != 1).expand(banks, -1) if masked else None
        outputs = recurrent_delta_update(weight, moment, keys, values, gates, active, backend=backend)
        kept = [x for x in outputs if x is not None]
        sum((x * torch.arange(x.numel(), device=device).reshape(x.shape) / x.numel()).sum() for x in kept).backward()
        leaves = [weight, keys, values, gates[0], gates[2], *([moment, gates[1]] if momentum else [])]
        runs.append([*kept, *(leaf.grad for leaf in leaves)])
    for expected, got in zip(*runs, strict=True):
        # float32 sums in another order over at most 63 terms
        assert rms_ratio(expected.detach(), got.detach()) < 1e-5


def test_the_gate_bites(device):
    # one decay too many in a hundred is far outside the tolerance of the comparison above
    weight, moment, keys, values, gates = inputs(1, 20, 63, 100, dtype=torch.float32, device=device)
    sound = recurrent_delta_update(weight, moment, keys, values, gates, backend="triton")[0]
    wrong = recurrent_delta_update(
        weight, moment, keys, values, (gates[0], gates[1], gates[2] * 1.01), backend="triton"
    )[0]
    assert rms_ratio(sound, wrong) > 1e-4
