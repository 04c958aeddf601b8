"""Learned weights of a mechanism as one safetensors file, named by the hash of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raymem.errors import Corrupt, InvalidInput, InvalidSpec
from raymem.inputs import json_value, named, shown
from raymem.memory import class_of, option_names
from raymem.memory.base import Memory
from raymem.tensors import is_dense, read_object, read_safetensors, require_finite, save_safetensors

_FORMAT = "raymem-params-1"
_KEY = "raymem"
_PREFIX = "memory."
_GATE = "gate."
# how deep `about` may be nested
_DEEPEST = 32


@dataclass(frozen=True)
class Learned:
    """Weights of one kind; a value.

    `tensors` are a mechanism's own, named `memory.…`, and those of a gate in front of a model, `gate.…`. `options` are
    what a bank's options must say for them to be of use. `about` holds how they were made and their figures: plain
    JSON data.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file. The same weights and words give the same bytes."""
        head = {"format": _FORMAT, "kind": self.kind, "options": dict(self.options), "about": dict(self.about)}
        # one key: several would come in any order
        metadata = {_KEY: json.dumps(head, sort_keys=True, allow_nan=False)}
        return save_safetensors(dict(sorted(self.tensors.items())), metadata)

    @staticmethod
    def from_bytes(data: bytes, name: str) -> Learned:
        """Read what `to_bytes` wrote.

        Raises:
            Corrupt: not such a file, or not the one that `name` names.
        """
        if name_of(data) != name:
            raise Corrupt(f"params {name} have other bytes than their name says ({name_of(data)}); train again")
        metadata, tensors = read_safetensors(data, f"params {name}")
        head = read_object(metadata.get(_KEY), f"what params {name} say of themselves")
        if head.get("format") != _FORMAT:
            said = str(head.get("format"))[:80]
            raise Corrupt(f"params {name} are of format {said!r}; this raymem reads {_FORMAT!r}: train again")
        try:
            found = Learned(head["kind"], tensors, head["options"], head["about"])
        except KeyError as error:
            raise Corrupt(f"params {name} don't say their {error.args[0]}; train again") from error
        try:
            return found.check()
        except InvalidInput as error:
            raise Corrupt(f"params {name}: {error.message}") from error

    def check(self) -> Learned:
        """Return these weights if a bank of their kind could use them.

        Whether they fit a bank's widths is for `load_into` to say.

        Raises:
            InvalidSpec: no such kind, options that it doesn't have, or weights that it doesn't learn, naming them.
        """
        if not isinstance(self.kind, str):
            raise InvalidSpec(f"the params' kind is {shown(self.kind)}; train again")
        for what, said in (("options", self.options), ("about", self.about), ("tensors", self.tensors)):
            if not isinstance(said, Mapping):
                raise InvalidSpec(f"the params' {what} are {shown(said)}; give a map. Train again")
            if what != "tensors":
                named(f"{what} of the params", partial(json_value, depth=_DEEPEST), dict(said))
        if odd := set(self.options) - option_names(self.kind):
            raise InvalidSpec(
                f"the params' options {str(sorted(odd))[:80]} are none of a {self.kind} bank; train again"
            )
        known = tuple(f"{_PREFIX}{name}." for name in class_of(self.kind).learns)
        for name, tensor in self.tensors.items():
            if not _is_weight(name, tensor, (*known, _GATE)):
                what = f"{tensor.dtype} {list(tensor.shape)}" if is_dense(tensor) else shown(tensor)
                raise InvalidSpec(
                    f"the params' {shown(name)}, {what}, is no weight that a "
                    f"{self.kind} bank learns; there are floats named {', '.join((*known, _GATE))}… Train again"
                )
        try:
            require_finite(self.tensors, "the params")
        except Corrupt as error:
            raise InvalidSpec(f"{error.message}; train again") from error
        return self

    def load_into(self, memory: Memory) -> None:
        """Give a mechanism these weights.

        Raises:
            InvalidSpec: they are another kind's, or don't fit its options.
        """
        if memory.kind != self.kind:
            raise InvalidSpec(f"these params are of kind {self.kind!r} and the bank is of kind {memory.kind!r}")
        own = {n.removeprefix(_PREFIX): tensor for n, tensor in self.tensors.items() if n.startswith(_PREFIX)}
        wanted = memory.state_dict()
        odd = sorted(n for n in own.keys() | wanted.keys() if _form(own.get(n)) != _form(wanted.get(n)))
        if odd:
            raise InvalidSpec(
                f"params don't fit a {self.kind} bank of these options: {odd[0]} is {_form(own.get(odd[0]))} and "
                f"{_form(wanted.get(odd[0]))} is wanted; they were trained for options {dict(self.options)}"
            )
        memory.load_state_dict(own)


def of_memory(memory: Memory) -> dict[str, Tensor]:
    """A mechanism's weights as `Learned.tensors` names them."""
    return {f"{_PREFIX}{name}": tensor.detach().clone() for name, tensor in memory.state_dict().items()}


def name_of(data: bytes) -> str:
    """The name of a file with these bytes, `sha256:…`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _is_weight(name: object, tensor: object, known: tuple[str, ...]) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.startswith(known)
        and isinstance(tensor, Tensor)
        and is_dense(tensor)
        and tensor.is_floating_point()
        and tensor.numel() > 0
    )


def _form(tensor: Tensor | None) -> tuple[torch.dtype, list[int]] | None:
    return None if tensor is None else (tensor.dtype, list(tensor.shape))
