"""The memory mechanisms, one file each, built by name."""

from __future__ import annotations

import importlib

from pydantic import ValidationError
from torch import Tensor

from raymem.errors import InvalidSpec
from raymem.memory.base import Dims, Memory, MergeRule

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
    from raymem.memory.rows import RowMemory

    return issubclass(class_of(kind), RowMemory)


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
