"""The small tasks that papers on recurrent memories report: how a batch is drawn, how a model is trained on it.

Shape legend: `B` sequences, `T` steps, `A` steps with an answer, `I` input and `O` output bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


class Batch(NamedTuple):
    """Inputs `[B, T, I]`, and the bits `[B, A, O]` that the last A steps are to put out."""

    inputs: Tensor
    targets: Tensor


def copy(count: int, length: int, generator: torch.Generator, bits: int = 8) -> Batch:
    """Random bits, a flag, then silence in which they are to be repeated.

    Reference:
        NTM (1410.5401) section 4.1.
    """
    targets = torch.randint(2, (count, length, bits), generator=generator).float()
    inputs = torch.zeros(count, 2 * length + 1, bits + 1)
    inputs[:, :length, :bits] = targets
    inputs[:, length, bits] = 1
    return Batch(inputs, targets)


def associative_recall(count: int, pairs: int, generator: torch.Generator, bits: int = 6) -> Batch:
    """Pairs of a key and a value, one a step; then the keys in another order, each to be answered with its value.

    Reference:
        NTM (1410.5401) section 4.3, with keys and values of one step each.
    """
    numbers = torch.rand(count, 2**bits, generator=generator).argsort(1)[:, :pairs]
    keys = (numbers[..., None] >> torch.arange(bits) & 1).float()
    values = torch.randint(2, (count, pairs, bits), generator=generator).float()
    order = torch.rand(count, pairs, generator=generator).argsort(1)[..., None].expand(-1, -1, bits)
    inputs = torch.zeros(count, 2 * pairs, 2 * bits + 1)
    inputs[:, :pairs, :bits], inputs[:, :pairs, bits:-1] = keys, values
    inputs[:, pairs:, :bits], inputs[:, pairs:, -1] = keys.gather(1, order), 1
    return Batch(inputs, values.gather(1, order))


class Lstm(nn.Module):
    """What the memories are compared with: an LSTM and nothing else.

    Args:
        inputs: I, width of an input.
        outputs: O, width of an output.
        hidden: width of the LSTM.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.core, self.output = nn.LSTM(inputs, hidden, batch_first=True), nn.Linear(hidden, outputs)

    def forward(self, inputs_BTI: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs `[B, T, O]` and the state after them."""
        hidden, state = self.core(inputs_BTI)
        return self.output(hidden), state


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the answers' bits."""
    return binary_cross_entropy_with_logits(model(batch.inputs)[0][:, -batch.targets.shape[1] :], batch.targets)


def train(
    model: nn.Module, draw: Callable[[int], Batch], updates: int, *, rate: float = 3e-3, clip: float = 1.0
) -> None:
    """Adam on batches drawn by update, gradients clipped by norm, a rate that falls to a tenth."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    # late large steps undo what was learned
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, updates)
    for update in range(updates):
        optimizer.zero_grad()
        loss(model, draw(update)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()


def wrong_bits(model: nn.Module, batch: Batch) -> float:
    """Share of the answers' bits that are wrong."""
    with torch.no_grad():
        answers = model(batch.inputs)[0][:, -batch.targets.shape[1] :]
    return float(((answers > 0) != (batch.targets > 0.5)).float().mean())
