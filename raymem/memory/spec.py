"""What tensors a state is made of: their shapes and dtypes, and the check that loaded ones fit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raymem.errors import Corrupt
from raymem.memory.base import State


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor; a -1 in the shape stands for any length."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of one such tensor, its free lengths counted as 1."""
        return torch.Size([abs(n) for n in self.shape]).numel() * self.dtype.itemsize

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` has this dtype and shape."""
        same = len(self.shape) == tensor.dim() and all(
            a in (-1, b) for a, b in zip(self.shape, tensor.shape, strict=True)
        )
        return same and tensor.dtype == self.dtype


StateSpec = dict[str, TensorSpec]


def check_state(kind: str, tensors: State, spec: StateSpec) -> None:
    """Raise Corrupt unless `tensors` are exactly those that `spec` names."""
    if tensors.keys() != spec.keys():
        odd = sorted(tensors.keys() ^ spec.keys())
        raise Corrupt(f"state of a {kind} bank has missing or unknown tensors {odd}; it was made with other options")
    for name, wanted in spec.items():
        if not wanted.fits(tensors[name]):
            got = tensors[name]
            raise Corrupt(
                f"tensor {name!r} of a {kind} bank is {got.dtype} {list(got.shape)}; "
                f"expected {wanted.dtype} {list(wanted.shape)}"
            )
