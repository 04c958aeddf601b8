"""Trained DNCs: the copy task, and associative recall with more pairs than any seen."""

import pytest
import torch
from small_tasks import Batch, Lstm, associative_recall, copy, train, wrong_bits

from raymem.memory.dnc_cell import DncCell

BITS = 6
LONGEST, MOST_PAIRS = 8, 6


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


def recalls(generator) -> Batch:
    pairs = int(torch.randint(2, MOST_PAIRS + 1, (), generator=generator))
    return associative_recall(32, pairs, generator, BITS)


def recall_error(make, seed: int, updates: int) -> float:
    """Share of wrong bits at twice as many pairs as were seen in training."""
    torch.manual_seed(seed)
    model = trained(make(), seed, recalls, updates)
    return wrong_bits(model, associative_recall(300, 2 * MOST_PAIRS, torch.Generator().manual_seed(99), BITS))


def recaller() -> DncCell:
    # plain cells need several times as long: with masks the part of a word that is a key can be looked up by itself
    return DncCell(2 * BITS + 1, BITS, slots=16, word=16, heads=1, hidden=64, masked=True, deallocate=True)


@pytest.mark.slow
def test_a_trained_dnc_recalls_twice_as_many_pairs_as_it_saw_far_better_than_an_lstm(figure):
    found = sorted(recall_error(recaller, seed, 5000) for seed in range(3))[1]
    # more than twice the weights and three times the updates
    lstm = recall_error(lambda: Lstm(2 * BITS + 1, BITS, hidden=128), 0, 15_000)
    task = "associative recall, bits wrong at 12 pairs, trained on 2 to 6"
    figure("dnc", task, found, below=lstm / 2, baseline={"LSTM": lstm})
