"""Tensors from callers and from safetensors files, checked before a bank takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic_core import from_json
from torch import Tensor

from raymem.errors import Corrupt, InvalidTrace, TooLarge
from raymem.inputs import shown

# what a message may carry, too
MOST_BYTES = 2**30
# a view of one element may claim any size
_MOST_ELEMENTS = 2**48
# of names, shapes and what was said of the tensors; 100 bytes a tensor are usual
_HEAD_BYTES = 2**20


def states(what: str, given: object, dtype: torch.dtype) -> Tensor:
    """Floats as a bank takes them: a tensor keeps its dtype; numpy arrays and nested lists are cast to `dtype`.

    Raises:
        InvalidTrace: no numbers, ragged lists, or a tensor without values of its own.
        TooLarge: over 1 GiB.
    """
    return dense(what, given) if isinstance(given, Tensor) else _from_array(what, given, "fiu").to(dtype)


def token_ids(given: object) -> Tensor:
    """Token ids as int64, of a tensor, an array or a list of whole numbers.

    Raises:
        InvalidTrace: other numbers, booleans too.
    """
    if isinstance(given, list | tuple) and any(isinstance(token, bool) for token in given):
        raise InvalidTrace("tokens are a list with True or False in it; give whole numbers")
    found = dense("tokens", given) if isinstance(given, Tensor) else _from_array("tokens", given, "iu", np.int64)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise InvalidTrace(f"tokens are {found.dtype}; give whole numbers, such as torch.int64")
    return found.to(torch.int64)


def dense(what: str, tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU, without gradients; strides stay, and nothing is copied that is there already.

    Raises:
        InvalidTrace: sparse, nested, quantised, or on the meta device.
        TooLarge: over 1 GiB.
    """
    if not is_dense(tensor):
        kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise InvalidTrace(f"{what} are a tensor that is {kind}; give a dense one: .to_dense(), .dequantize()")
    if tensor.nbytes > MOST_BYTES:
        raise TooLarge(f"{what} have {tensor.nbytes:,} bytes; give at most {MOST_BYTES:,} at once", limit=MOST_BYTES)
    return tensor.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg()


def is_dense(given: object) -> bool:
    """Whether this is a tensor whose values are there to be looked at."""
    return (
        isinstance(given, Tensor)
        and given.layout == torch.strided
        and not (given.is_nested or given.is_quantized or given.is_meta)
    )


def require_sizes(shape: list[int]) -> None:
    """Raise InvalidTrace for sizes that no tensor has: beside a zero too."""
    elements = 1
    for size in shape:
        elements *= max(1, size)
    if elements > _MOST_ELEMENTS:
        raise InvalidTrace(f"a tensor of {str(shape)[:80]}: too large to be true")


def _from_array(what: str, given: object, kinds: str, dtype: Any = np.float32) -> Tensor:
    if given is None or isinstance(given, str | bytes | dict | set | frozenset):
        raise InvalidTrace(f"{what} are {shown(given)}; give a tensor, an array or lists of numbers")
    try:
        # a range may claim any length
        if isinstance(given, Sequence) and len(given) > MOST_BYTES:
            raise TooLarge(
                f"{what} have {len(given)} rows; give at most {MOST_BYTES:,} bytes at once", limit=MOST_BYTES
            )
        array = np.asarray(given)
    except TooLarge:
        raise
    # what an object's own way of becoming an array raises, too
    except (ValueError, TypeError, OverflowError, RuntimeError, AttributeError, LookupError, MemoryError) as error:
        raise InvalidTrace(f"{what} can't be made an array: {str(error)[:200]}; give lists of equal lengths") from error
    if array.nbytes > MOST_BYTES:
        raise TooLarge(f"{what} have {array.nbytes:,} bytes; give at most {MOST_BYTES:,} at once", limit=MOST_BYTES)
    # an empty list is an array of floats; jax's bfloat16 is of no kind that numpy knows
    if array.dtype.kind not in kinds and array.size and array.dtype.name != "bfloat16":
        raise InvalidTrace(f"{what} are {shown(given)} of {array.dtype}; give a tensor, an array or lists of numbers")
    if array.dtype == np.uint64 and dtype is np.int64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidTrace(f"{what} hold {array.max()}; give numbers of at most 63 bits")
    with np.errstate(over="ignore"):
        # too large for a float32 is infinite, which a bank refuses
        found = torch.from_numpy(np.array(array, dtype=dtype, order="C"))
    # numpy's strides of nothing are none that torch takes
    return found if found.numel() else torch.zeros(found.shape, dtype=found.dtype)


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
            low, high = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
            # NaN goes through both ends
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise Corrupt(f"{what}: tensor {name[:80]!r} holds NaN or Inf")
