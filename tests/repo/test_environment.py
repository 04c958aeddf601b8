"""What the shared fixtures promise to every other test."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch


def _run_as(module: str, expression: str) -> Any:
    return eval(expression, {"__name__": module, "torch": torch})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("make", ["torch.empty(3, dtype={})", "torch.empty_like(torch.zeros(3, dtype={}))"])
def test_memory_that_raymem_does_not_write_reads_as_nan(make, dtype):
    assert _run_as("raymem.memory.spalm", make.format(dtype)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.uint16])
def test_integers_that_raymem_does_not_write_are_out_of_range(dtype):
    unwritten = _run_as("raymem.kernels.topk", f"torch.zeros(1).new_empty(3, dtype={dtype})")
    assert (unwritten == torch.iinfo(dtype).max).all()


def test_other_peoples_memory_is_left_alone(monkeypatch):
    filled = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: filled.append(value) or tensor)
    _run_as("torch.nn.init", "torch.empty(3)")
    assert filled == []
    _run_as("raymem.memory.titans", "torch.empty(3)")
    assert len(filled) == 1


def test_random_numbers_start_from_one_seed():
    first = (random.random(), float(torch.rand(())))
    random.seed(0)
    torch.manual_seed(0)
    assert first == (random.random(), float(torch.rand(())))


def test_nothing_is_fetched_and_kernels_run_without_a_gpu():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert Path("/dev/nvidiactl").exists() or os.environ["TRITON_INTERPRET"] == "1"
