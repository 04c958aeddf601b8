"""Which implementation of an operation runs: Triton on CUDA tensors, plain torch elsewhere, or what was asked for."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from raymem.errors import ConfigError

ENV = "RAYMEM_KERNELS"


def use_triton(tensor: Tensor, backend: str | None = None) -> bool:
    """Whether the Triton kernel should run on `tensor`.

    Args:
        tensor: any operand; its device decides when nothing else does.
        backend: "torch", "triton" or "auto"; the environment's RAYMEM_KERNELS when None, "auto" when that is unset.

    Raises:
        ConfigError: another backend name.
    """
    choice = backend or os.environ.get(ENV, "auto")
    if choice not in ("auto", "torch", "triton"):
        raise ConfigError(f"kernel backend {choice!r} is unknown; use auto, torch or triton ({ENV} or backend=)")
    if choice == "auto":
        return tensor.is_cuda and find_spec("triton") is not None
    return choice == "triton"


def undispatched(tensor: Tensor) -> AbstractContextManager[None]:
    """A context that switches off an enclosing `with torch.device(...)`, if `tensor` is on a GPU.

    Under such a context every operation and attribute of a tensor is a call of Python: launching a kernel took 59 us
    instead of 24. What runs inside has to name devices.
    """
    guard: AbstractContextManager[None] = torch._C.DisableTorchFunction() if tensor.is_cuda else nullcontext()
    return guard
