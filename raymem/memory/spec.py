"""What tensors a state is made of: their shapes and dtypes, and the check that loaded ones fit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from raymem.errors import Corrupt
from raymem.memory.base import State

# no bank sees as many rows
ROWS_END = 2**53


class TensorSpec(NamedTuple):
    """Shape, dtype and domain of one tensor; a -1 in the shape stands for any length.

    Entries lie in `low` … `high`, None being no bound; those of float tensors are finite besides.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    low: float | None = None
    high: float | None = None

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


def check_state(kind: str, tensors: State, spec: StateSpec, *, deep: bool = True) -> None:
    """Raise Corrupt unless `tensors` are exactly those that `spec` names, each entry in its domain.

    Without `deep`, only of those are the entries looked at that have one number a row.
    """
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
        if deep or len(wanted.shape) < 2:
            require_domain(f"tensor {name!r} of a {kind} bank", wanted, tensors[name])


def require_domain(what: str, spec: TensorSpec, tensor: Tensor) -> None:
    """Raise Corrupt if an entry is outside the domain, naming it."""
    bounded = spec.low is not None or spec.high is not None
    if not tensor.numel() or not (bounded or tensor.is_floating_point()):
        return
    # NaN goes through both ends
    least, most = (end.item() for end in torch.aminmax(tensor))
    low, high = -math.inf if spec.low is None else spec.low, math.inf if spec.high is None else spec.high
    if not (low <= least <= most <= high) or math.inf in (-least, most):
        raise Corrupt(f"{what} holds {least} to {most}; expected finite entries of {low} to {high}")
