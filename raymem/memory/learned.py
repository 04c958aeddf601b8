"""What training leaves behind: a mechanism's weights as one safetensors file, named by the hash of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from raymem.errors import Corrupt, InvalidSpec
from raymem.memory.base import Memory

_FORMAT = "raymem-params-1"
_KEY = "raymem"
_PREFIX = "memory."


@dataclass(frozen=True)
class Learned:
    """Weights of one kind; a value.

    `tensors` are a mechanism's own, named `memory.…`, and those of a gate in front of a model, `gate.…`. `options` are
    what a bank's options must say for them to be of use. `about` says how they were made and what they are worth: plain
    JSON data.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file. The same weights and words give the same bytes."""
        head = {"format": _FORMAT, "kind": self.kind, "options": dict(self.options), "about": dict(self.about)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.tensors.items())}
        # one key: several would come in any order
        return safetensors.torch.save(tensors, {_KEY: json.dumps(head, sort_keys=True, allow_nan=False)})

    @staticmethod
    def from_bytes(data: bytes, name: str) -> Learned:
        """Read what `to_bytes` wrote.

        Raises:
            Corrupt: not such a file, or not the one that `name` names.
        """
        if name_of(data) != name:
            raise Corrupt(f"params {name} have other bytes than their name says ({name_of(data)}); train again")
        try:
            length = int.from_bytes(data[:8], "little")
            head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"params {name} are no such file ({type(error).__name__}: {error}); train again") from error
        if head.get("format") != _FORMAT:
            raise Corrupt(f"params {name} are of format {head.get('format')!r}; this raymem reads {_FORMAT!r}")
        return Learned(head["kind"], tensors, head["options"], head["about"])

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


def _form(tensor: Tensor | None) -> tuple[torch.dtype, list[int]] | None:
    return None if tensor is None else (tensor.dtype, list(tensor.shape))
