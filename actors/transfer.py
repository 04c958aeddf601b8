"""Traces, readouts and attended rows between processes of one Ray cluster: tensors go as byte arrays, which Ray moves
without copying.

They are bytes with dtype and shape beside them, see `raymem.tensors`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from raymem.rows import AttendedRows, Trace
from raymem.tensors import dtype_name, from_bytes, to_bytes
from raymem.types import AttendQuery, MemoryTokens, Readout

T = TypeVar("T", Trace, Readout, AttendQuery, AttendedRows, MemoryTokens)
Fields = Trace | Readout | AttendQuery | AttendedRows | MemoryTokens


class Packed(NamedTuple):
    """A tensor's bytes, its dtype's name and its shape."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: str
    shape: tuple[int, ...]


def pack(tensor: Tensor) -> Packed:
    """A tensor as bytes; it shares memory with a contiguous CPU tensor."""
    return Packed(to_bytes(tensor), dtype_name(tensor.dtype), tuple(tensor.shape))


def unpack(packed: Packed) -> Tensor:
    """The tensor that `pack` was given, in memory of its own: what Ray hands over is read-only."""
    return from_bytes(packed.data.copy(), packed.dtype, packed.shape)


def pack_fields(value: Fields) -> dict[str, Any]:
    """One of these as a dict with its tensors packed."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: pack(item) if isinstance(item, Tensor) else item for name, item in fields.items()}


def unpack_fields(cls: type[T], fields: dict[str, Any]) -> T:
    """What `pack_fields` was given."""
    unpacked: dict[str, Any] = {
        name: unpack(item) if isinstance(item, Packed) else item for name, item in fields.items()
    }
    return cls(**unpacked)
