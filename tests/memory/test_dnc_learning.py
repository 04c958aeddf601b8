"""Trained DNCs: the copy task."""

import pytest
import torch
from small_tasks import Batch, copy, train, wrong_bits

from raymem.memory.dnc_cell import DncCell

BITS = 6
LONGEST = 8


def trained(model, seed: int, draw, updates: int):
    generator = torch.Generator().manual_seed(seed)
    train(model, lambda update: draw(generator), updates)
    return model


def copies(generator) -> Batch:
    return copy(32, int(torch.randint(1, LONGEST + 1, (), generator=generator)), generator, BITS)


def copy_error(seed: int) -> float:
    """Share of wrong bits over all lengths that it was trained on."""
    torch.manual_seed(seed)
    cell = trained(DncCell(BITS + 1, BITS, slots=16, word=16, heads=1, hidden=64), seed, copies, 1000)
    generator = torch.Generator().manual_seed(99)
    return sum(wrong_bits(cell, copy(100, length, generator, BITS)) for length in range(1, LONGEST + 1)) / LONGEST


def test_a_trained_dnc_copies_without_error(figure):
    figure("dnc", "copy, bits wrong at lengths 1 to 8", copy_error(0), below=0.0, baseline={"chance": 0.5})


@pytest.mark.slow
def test_most_seeds_copy_without_error(figure):
    figure("dnc", "the same, median of 3 seeds", sorted(map(copy_error, range(3)))[1], below=0.0)
