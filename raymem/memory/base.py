"""What every memory mechanism is, the tensors that its state is made of, and the mechanisms by name.

A mechanism is pure tensor code: its module holds the learned parameters, its state is a value outside.

Shape legend: `B` banks, `T` or `N` rows, `Q` queries, `K` key width, `P` width of projected keys, `V` value width,
`k` candidates.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from raymem.errors import Corrupt, InvalidSpec, Unsupported

# no bank sees as many rows
ROWS_END = 2**53
_BLOCK_ROWS = 64
# the most entries of a projection: 0.5 GB while it is drawn
_MOST_NUMBERS = 2**26
_CLASSES = {
    "compressive": "Compressive",
    "dct": "Dct",
    "dnc": "Dnc",
    "larimar": "Larimar",
    "lemn": "Lemn",
    "ntm": "Ntm",
    "spalm": "Spalm",
    "titans": "Titans",
}

State = dict[str, Tensor]
# what torch's generators take
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MergeRule = Literal["exact", "approximate", "refused"]


class Options(BaseModel):
    """Base of each kind's options: frozen, and an unknown option is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Dims(NamedTuple):
    """Widths of keys and of the vector values that come with the rows (0: none)."""

    key: int
    value: int


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


StateSpec = dict[str, TensorSpec]


def check_state(kind: str, tensors: State, spec: StateSpec, *, deep: bool = True) -> None:
    """Raise Corrupt unless `tensors` are exactly those that `spec` names, each entry in its domain.

    Without `deep`, entries are checked only of tensors with one number a row.
    """
    if tensors.keys() != spec.keys():
        odd = sorted(tensors.keys() ^ spec.keys())
        raise Corrupt(f"state of a {kind} bank has missing or unknown tensors {odd}; it was made with other options")
    for name, (shape, dtype, low, high) in spec.items():
        tensor = tensors[name]
        fits = len(shape) == tensor.dim() and all(a in (-1, b) for a, b in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype != dtype:
            raise Corrupt(
                f"tensor {name!r} of a {kind} bank is {tensor.dtype} {list(tensor.shape)}; "
                f"expected {dtype} {list(shape)}"
            )
        bounded = low is not None or high is not None or tensor.is_floating_point()
        if not tensor.numel() or not bounded or not (deep or len(shape) < 2):
            continue
        # aminmax gives NaN at both ends where an entry is NaN
        least, most = (end.item() for end in torch.aminmax(tensor))
        lowest, highest = -math.inf if low is None else low, math.inf if high is None else high
        if not (lowest <= least <= most <= highest) or math.inf in (-least, most):
            raise Corrupt(
                f"tensor {name!r} of a {kind} bank holds {least} to {most}; "
                f"expected finite entries of {lowest} to {highest}"
            )


@dataclass(frozen=True)
class EncodedRows:
    """Encoded rows of one bank, in the order in which the mechanism must see them.

    `keys_NK` float32, unit length; `tokens_N` int64, the token that followed each row; `values_NV` float32 or None;
    `pos_N`, `seq_N`, `source_N` int64: where each row came from.
    """

    keys_NK: Tensor
    tokens_N: Tensor
    values_NV: Tensor | None
    pos_N: Tensor
    seq_N: Tensor
    source_N: Tensor

    def __len__(self) -> int:
        return int(self.keys_NK.shape[0])


@dataclass(frozen=True)
class Found:
    """A mechanism's answer to queries [Q, K], before calibration turns similarity into relevance.

    `values_QV` float32 blended vector; `similarity_Q` the highest cosine with the keys held, or with the seeded
    reservoir of them (-1 when empty); `tokens_Qk` candidate next tokens (-1 where absent), best first, with
    `scores_Qk` (-inf where absent); row kinds also say where each candidate came from (-1 where absent) and give its
    vector.
    """

    values_QV: Tensor
    similarity_Q: Tensor
    tokens_Qk: Tensor
    scores_Qk: Tensor
    pos_Qk: Tensor | None = None
    seq_Qk: Tensor | None = None
    source_Qk: Tensor | None = None
    vectors_QkV: Tensor | None = None


@dataclass(frozen=True)
class Shown:
    """Which rows of a bank a model's attention may see: positions in its journal, int64, oldest first.

    `fine_N` are seen as they are: all of them, or the best pieces for a question. Every `ratio` consecutive ones of the
    older `coarse_M` become one, whatever the question, so that all who attend to the bank see the same; `coarse_M` is
    empty where a kind compresses nothing. `next_N` is the index of the fine row linked behind each, -1 where there is
    none; None where a kind has no links.
    """

    fine_N: Tensor
    coarse_M: Tensor
    ratio: int = 1
    next_N: Tensor | None = None


class Memory(nn.Module, ABC):
    """One mechanism; its parameters are the learned ones only, its state is a value handed in and out.

    The runtime calls only these methods, each on one bank's state. `absorb` may reuse the storage of the state it was
    given when gradients are off; the caller keeps only what it returns.

    `merge_rule` is what `merge` gives of several banks' states: "exact", the state of one bank that has seen all their
    rows; "approximate", one that such a bank could have; or "refused". Each class says why.
    """

    kind: ClassVar[str]
    merge_rule: ClassVar[MergeRule]
    options_type: ClassVar[type[Options]] = Options
    # whether the state is the rows themselves, and not a bounded record made of them
    keeps_rows: ClassVar[bool] = False
    # whether a row can be taken out exactly; other kinds are replayed without it
    forgets: ClassVar[bool] = False
    # how many consecutive rows a question shows attention together; 0: the same rows whatever the question
    piece: ClassVar[int] = 32
    # the beginnings of its learned weights' names
    learns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dims: Dims, options: Options, budget_bytes: int) -> None:
        super().__init__()
        self.dims = dims
        self.options = options
        self.budget_bytes = budget_bytes

    @abstractmethod
    def empty(self) -> Any:
        """The state of a bank that has seen no rows; a read of it gives zeros and similarity -1."""

    @abstractmethod
    def absorb(self, state: Any, rows: EncodedRows) -> Any:
        """Write rows in order; cutting them into other calls gives the same state."""

    @abstractmethod
    def lookup(self, state: Any, queries_QK: Tensor, k: int) -> Found:
        """Read without changing the state."""

    def shown(self, state: Any, pos_N: Tensor) -> Shown:
        """Which rows the policy of this kind lets attention see.

        Args:
            state: of one bank.
            pos_N: int64, the journal positions of all rows that the bank was given (`EncodedRows.pos_N`), in order. A
                merged state counts rows by their age: its newest row is the last of these.

        Raises:
            Unsupported: the kind keeps no rows.
        """
        raise unshown(self.kind)

    @abstractmethod
    def merge(self, states: Sequence[Any]) -> Any:
        """One state of several of this spec, by the class's `merge_rule`; those given are left as they are.

        Raises:
            Unsupported: the rule is "refused", or these states can't be merged.
            InvalidInput: no states, or states of different forms.
        """

    @abstractmethod
    def dump(self, state: Any) -> State:
        """The whole state as named tensors of its own, which later writes don't touch."""

    @abstractmethod
    def load(self, tensors: State) -> Any:
        """The state that `dump` wrote, bitwise.

        Args:
            tensors: the state takes them over; rows may grow into their storage where it is longer than they are.

        Raises:
            Corrupt: a tensor is missing or has another shape or dtype.
        """

    @abstractmethod
    def nbytes(self, state: Any) -> int:
        """Bytes the state holds; never more than the budget."""


def positions_of(number_N: Tensor, count: int, pos_N: Tensor) -> Tensor:
    """Journal positions of the rows with these numbers, the newest of `count` being the last of `pos_N`.

    Rows older than all that `pos_N` tells are left out.
    """
    index_N = number_N.to(pos_N.device) - (count - len(pos_N))
    return pos_N[index_N[index_N >= 0]]


class Projection(nn.Module):
    """Seeded orthonormal projection of unit keys to `dims` dimensions, unit length again; the identity without `dims`.

    The same seed gives every bank the same projection. A key's projection does not depend on the rows beside it.
    """

    matrix_KP: Tensor

    def __init__(self, width: int, dims: int | None, seed: int) -> None:
        super().__init__()
        self.dims = width if dims is None else dims
        self.identity = self.dims == width
        if self.dims > width or (not self.identity and self.dims * width > _MOST_NUMBERS):
            raise InvalidSpec(
                f"key_dims={self.dims} of keys of width {width}: choose fewer than the width, and at most "
                f"{_MOST_NUMBERS // width} for keys as wide"
            )
        if not self.identity:
            with torch.device("cpu"):
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randn(width, self.dims, generator=generator, dtype=torch.float64)
                # made on the CPU in float64, so that every device and machine rounds to the same matrix
                self.register_buffer("matrix_KP", torch.linalg.qr(drawn)[0].float(), persistent=False)

    def forward(self, keys: Tensor) -> Tensor:
        """Keys [..., K] -> [..., dims], float32 or the wider type given."""
        wide = keys if keys.dtype == torch.float64 else keys.float()
        if self.identity:
            return wide
        flat = wide.reshape(-1, wide.shape[-1])
        # blocks of one size: a matrix product's rounding depends on its shape, and must not on how rows arrived
        padded = pad(flat, (0, 0, 0, -len(flat) % _BLOCK_ROWS))
        matrix = self.matrix_KP.to(wide.dtype)
        parts = [padded[i : i + _BLOCK_ROWS] @ matrix for i in range(0, len(padded), _BLOCK_ROWS)]
        projected = torch.cat([flat[:0, : self.dims], *parts])[: len(flat)]
        return normalize(projected, dim=-1).reshape(*keys.shape[:-1], self.dims)


def kinds() -> list[str]:
    """Names of the mechanisms that can be built."""
    return sorted(_CLASSES)


def merge_rule(kind: str) -> MergeRule:
    """What merging banks of a kind gives: "exact", "approximate" or "refused"; see Memory.

    Raises:
        InvalidSpec: unknown kind.
    """
    return class_of(kind).merge_rule


def keeps_rows(kind: str) -> bool:
    """Whether banks of a kind hold the rows themselves, and not a bounded state made of them.

    Raises:
        InvalidSpec: unknown kind.
    """
    return class_of(kind).keeps_rows


def unshown(kind: str) -> Unsupported:
    """Why a bank of this kind can't be attended."""
    return Unsupported(
        f"a {kind} bank keeps no rows that attention could see, only what it learned of them: mix it "
        "(bank.read), or attend to a bank of another kind"
    )


def shows_rows(kind: str) -> bool:
    """Whether attention can see rows of banks of a kind; see `Memory.shown`.

    Raises:
        InvalidSpec: unknown kind.
    """
    return class_of(kind).shown is not Memory.shown


def compacts(kind: str) -> bool:
    """Whether banks of a kind show attention the same rows whatever the question, so that they may be compacted.

    Raises:
        InvalidSpec: unknown kind.
    """
    return shows_rows(kind) and not class_of(kind).piece


def blend(kind: str, options: dict[str, object], scores_Qk: Tensor, vectors_QkV: Tensor) -> Tensor:
    """What a kind that keeps rows makes of neighbours' vectors, from a bank's options; see `RowMemory.blend`."""
    from raymem.memory.rows import RowMemory

    cls = class_of(kind)
    assert issubclass(cls, RowMemory)
    return cls.blend(cls.options_type.model_validate(options), scores_Qk, vectors_QkV)


def option_names(kind: str) -> set[str]:
    """Names of the options of a kind.

    Raises:
        InvalidSpec: unknown kind.
    """
    return set(class_of(kind).options_type.model_fields)


def build(kind: str, dims: Dims, options: dict[str, object], budget_bytes: int) -> Memory:
    """The mechanism `kind` with checked options.

    Raises:
        InvalidSpec: unknown kind or option, naming the value and what there is.
    """
    cls = class_of(kind)
    try:
        checked = cls.options_type.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        known = ", ".join(cls.options_type.model_fields)
        raise InvalidSpec(f"{kind} option {name}={first['input']!r}: {first['msg']}; options are {known}") from error
    return cls(dims, checked, budget_bytes)


def class_of(kind: str) -> type[Memory]:
    """The class of a kind.

    Raises:
        InvalidSpec: there is none of that name.
    """
    if kind not in _CLASSES:
        raise InvalidSpec(f"unknown kind {kind[:80]!r}; there is {', '.join(kinds())}")
    cls: type[Memory] = getattr(importlib.import_module(f"raymem.memory.{kind}"), _CLASSES[kind])
    return cls
