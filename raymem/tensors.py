"""Tensors in safetensors files, checked before a bank takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic_core import from_json
from torch import Tensor

from raymem.errors import Corrupt, InvalidTrace

# a view of one element may claim any size
_MOST_ELEMENTS = 2**48
# of names, shapes and what was said of the tensors; 100 bytes a tensor are usual
_HEAD_BYTES = 2**20


def require_sizes(shape: list[int]) -> None:
    """Raise InvalidTrace for sizes that no tensor has: beside a zero too."""
    elements = 1
    for size in shape:
        elements *= max(1, size)
    if elements > _MOST_ELEMENTS:
        raise InvalidTrace(f"a tensor of {str(shape)[:80]}: too large to be true")


def read_safetensors(data: bytes, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file.

    Args:
        data: the whole file.
        what: names it in errors.

    Raises:
        Corrupt: no such file, a head that is too large, or a tensor with NaN or Inf, naming it.
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_HEAD_BYTES, len(data) - 8):
        raise Corrupt(f"{what}: no such file: {len(data)} bytes without a safetensors head of at most {_HEAD_BYTES}")
    try:
        head = from_json(data[8 : 8 + length], allow_inf_nan=False)
        tensors = safetensors.torch.load(data)
    # what torch raises of a type that it doesn't have, or of a shape that no memory holds
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError, OverflowError) as error:
        raise Corrupt(f"{what}: no such file ({type(error).__name__}: {str(error)[:200]})") from error
    require_finite(tensors, what)
    said = head.get("__metadata__") or {}
    return dict(said), tensors


def read_object(text: str | None, what: str) -> dict[str, Any]:
    """A JSON object of a file's metadata.

    Raises:
        Corrupt: it is none.
    """
    try:
        found = from_json(text or "", allow_inf_nan=False)
    except ValueError as error:
        raise Corrupt(f"{what} is no JSON ({str(error)[:200]})") from error
    if not isinstance(found, dict):
        raise Corrupt(f"{what} is {str(found)[:80]}; expected an object")
    return found


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise Corrupt, naming it, if a tensor holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
            # NaN goes through both ends
            if not torch.stack(ends).isfinite().all():
                raise Corrupt(f"{what}: tensor {name[:80]!r} holds NaN or Inf")
