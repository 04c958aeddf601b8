"""From a spec to what works by it: encoder and mechanism, with the weights that it names."""

from __future__ import annotations

import psutil

from raymem.encode.calibration import Calibration
from raymem.encode.encoder import Encoder
from raymem.errors import InvalidSpec
from raymem.memory import build
from raymem.memory.base import Dims, Memory
from raymem.memory.learned import Learned
from raymem.memory.state import StateMemory
from raymem.types import BankSpec


def assemble(spec: BankSpec, calibration: Calibration, learned: Learned | None = None) -> tuple[Encoder, Memory]:
    """The encoder and the mechanism that a spec asks for, with the weights that it names.

    Raises:
        InvalidSpec: unknown kind, option or layer, a budget too small, weights that don't fit, naming the value.
        FingerprintMismatch: the calibration belongs to another model or other layers.
    """
    encoder = Encoder(spec, calibration)
    return encoder, mechanism(spec, encoder.key_width, learned)


def mechanism(spec: BankSpec, key_width: int, learned: Learned | None = None) -> Memory:
    """The mechanism alone, for keys of this width; see `assemble`."""
    # vector values live in the output-embedding space, which is as wide as the hidden states
    dims = Dims(key_width, spec.fingerprint.width if spec.fingerprint.values else 0)
    memory = build(spec.kind, dims, spec.options, spec.budget_bytes)
    if isinstance(memory, StateMemory):
        # made whole at once, whatever it will hold
        needed, there = sum(each.nbytes for each in memory.state_spec().values()), psutil.virtual_memory().total
        if needed > there:
            raise InvalidSpec(
                f"a {spec.kind} bank of these options takes {needed:,} bytes and this machine has {there:,}; lower "
                f"budget_bytes, which is {spec.budget_bytes:,}"
            )
    if learned is not None:
        learned.load_into(memory)
    return memory
