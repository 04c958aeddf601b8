"""How a tensor becomes bytes and back, in messages, snapshots and files alike.

A tensor is the name of its dtype, its shape and its elements in C order, little-endian. numpy and Arrow have no
bfloat16: there it goes as its uint16 bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic_core import from_json
from torch import Tensor

from raymem.errors import Corrupt, RaymemError
from raymem.inputs import shown

# all that torch has, but the quantised ones: their scales live outside their bytes
TENSOR_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}
_MOST_DIMENSIONS = 32
# no memory holds more
_MOST_ELEMENTS = 2**48
# of names, shapes and what was said of the tensors; 100 bytes a tensor are usual
_HEAD_BYTES = 2**20

assert sys.byteorder == "little", "tensors travel in the byte order of the machine"


def is_dense(given: object) -> bool:
    """Whether this is a tensor whose elements are all there is to it, and are in memory."""
    return (
        isinstance(given, Tensor)
        and given.layout == torch.strided
        and not (given.is_nested or given.is_quantized or given.is_meta)
    )


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as formats name it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def to_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's elements, one after another [bytes]; those of a contiguous one on the CPU are not copied."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return data


def from_bytes(
    data: bytearray | NDArray[np.uint8] | Tensor, dtype: object, shape: object, error: type[RaymemError] = Corrupt
) -> Tensor:
    """The tensor that `to_bytes` was given, in the memory of `data`, which can be written to.

    Raises:
        Corrupt: or `error`: no dtype or shape of a tensor, or another number of bytes than they say.
    """
    kind = TENSOR_DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise error(f"a tensor's dtype is {shown(dtype)}; expected one of torch, such as bfloat16")
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise error(f"a tensor's shape is {str(shape)[:80]}; expected up to {_MOST_DIMENSIONS} sizes")
    # sizes beside a zero count too: torch can't lay out [0, 2**62, 2**62]
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise error(f"a tensor's shape is {str(shape)[:80]}: too large to be true")
    expected = math.prod(shape) * kind.itemsize
    if expected != len(data):
        raise error(f"{len(data)} bytes can't be {dtype} {list(shape)}, which has {expected}; send row-major bytes")
    if not expected:
        return torch.zeros(0, dtype=torch.uint8).view(kind).reshape(shape)
    flat = data if isinstance(data, Tensor) else torch.frombuffer(data, dtype=torch.uint8)
    if kind == torch.bool and int(flat.max()) > 1:
        raise error(f"a bool tensor holds the byte {int(flat.max())}")
    return flat.view(kind).reshape(shape)


def to_bits(tensor: Tensor) -> NDArray[Any]:
    """A tensor as numpy and Arrow have it: bfloat16 as its uint16 bits. Nothing is copied on the CPU."""
    tensor = tensor.detach().cpu()
    bits: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return bits


def from_bits(bits: NDArray[Any]) -> Tensor:
    """The tensor that `to_bits` showed."""
    tensor = torch.from_numpy(bits)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def save_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors and what is said of them as a safetensors file."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, None if metadata is None else dict(metadata))


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
