"""Rows out of a paged cache, on the CPU and, where there is one, on a CUDA device."""

import pytest
import torch

from raymem.serving.vllm.sender import RowCopier

SLOTS = [5, 0, 33, 34, 12]


def cache_on(device):
    blocks, layers, size, width = 9, 2, 4, 3
    return torch.randn(blocks, layers, size, width, device=device).bfloat16()


def expected(cache):
    return torch.stack([cache[slot // 4, :, slot % 4] for slot in SLOTS]).cpu()


def test_rows_are_those_at_the_slots_and_their_own_memory():
    cache = cache_on("cpu")
    copier = RowCopier(cache)
    rows, ready = copier.copy(SLOTS)
    ready()
    before = expected(cache)
    cache.zero_()
    assert torch.equal(rows, before)
    assert copier.row_bytes == 2 * 3 * 2


@pytest.mark.gpu
def test_on_a_device_the_cache_may_be_overwritten_at_once():
    cache = cache_on("cuda")
    before = expected(cache)
    copier = RowCopier(cache)
    copies = []
    for _ in range(50):
        copies.append(copier.copy(SLOTS))
    cache.zero_()
    for rows, ready in copies:
        ready()
        assert rows.is_pinned()
        assert torch.equal(rows, before)
