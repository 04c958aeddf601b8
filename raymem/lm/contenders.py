"""The banks that an evaluation compares: of each kind at equal bytes, and of several kinds behind one gate.

Shape legend: Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from raymem import Bank, BankSpec, Fingerprint, Readout, Store, Trace
from raymem.encode.calibration import Calibration
from raymem.encode.encoder import Encoder
from raymem.errors import InvalidSpec
from raymem.lm.gate import combined_kinds
from raymem.lm.passes import Reading
from raymem.lm.sizing import ROWS, options_for
from raymem.memory import kinds as known_kinds
from raymem.memory.base import Dims

ALL, COMBINED = "all", "combined"
_ROWS_A_WRITE = 512


class Size(NamedTuple):
    """What a bank may hold, None for the kinds' own defaults, and how many rows are expected."""

    budget_bytes: int | None = None
    rows: int = ROWS


@dataclass(frozen=True)
class Contender:
    """One row of the table: the specs of the banks that together remember a document."""

    name: str
    specs: tuple[BankSpec, ...]

    @property
    def budget_bytes(self) -> int:
        """What the banks of one document may hold together."""
        return sum(spec.budget_bytes for spec in self.specs)

    def write(self, store: Store, place: int | str, reading: Reading) -> tuple[Bank, ...]:
        """Fresh banks that hold what was read of the document in this place."""
        banks = [store.create(f"eval/{self.name}-{spec.kind}-{place}", spec) for spec in self.specs]
        for trace in _traces(reading, self.specs[0].fingerprint):
            for bank in banks:
                bank.write(trace)
        return tuple(banks)


def expanded(names: Sequence[str]) -> list[str]:
    """What a user's names stand for: kinds, and `combined`; `all` is every one of them.

    Raises:
        InvalidSpec: no name, an unknown one, or one that is there twice.
    """
    known = [*known_kinds(), COMBINED]
    asked = known if tuple(names) == (ALL,) else list(names)
    if not asked or len(set(asked)) < len(asked) or not set(asked) <= set(known):
        raise InvalidSpec(
            f"kinds {', '.join(names) or 'none'}: choose among {', '.join(known)}, each once, or {ALL} of them"
        )
    return asked


def contenders(names: Sequence[str], plain: BankSpec, calibration: Calibration, size: Size) -> list[Contender]:
    """The rows of the table that names ask for.

    Args:
        names: see `expanded`.
        plain: a spec with the fingerprint of the rows to come.
        calibration: of the model that makes them.
        size: equal for all banks.

    Raises:
        InvalidSpec: wrong names, or a budget too small for a kind.
    """
    members = {name: combined_kinds() if name == COMBINED else (name,) for name in expanded(names)}
    return [Contender(name, sized(kinds, plain, calibration, size)) for name, kinds in members.items()]


def sized(kinds: Sequence[str], plain: BankSpec, calibration: Calibration, size: Size) -> tuple[BankSpec, ...]:
    """Specs of banks of these kinds, each of this size."""
    if size.budget_bytes is None:
        return tuple(plain.model_copy(update={"kind": kind}) for kind in kinds)
    dims, budget = Dims(Encoder(plain, calibration).key_width, 0), size.budget_bytes
    fields = [{"kind": kind, "options": options_for(kind, dims, budget, size.rows)} for kind in kinds]
    return tuple(plain.model_copy(update=own | {"budget_bytes": budget}) for own in fields)


def ask(banks: Sequence[Bank], hidden_QLd: Tensor, neighbours: int) -> list[Readout]:
    """What the banks of one document answer to a window's states."""
    return [bank.read(hidden_QLd, neighbours, start=0) for bank in banks]


def _traces(reading: Reading, made_by: Fingerprint) -> Iterator[Trace]:
    states_TLd = reading.written_TLd
    for start in range(0, len(states_TLd), _ROWS_A_WRITE):
        rows = slice(start, min(start + _ROWS_A_WRITE, len(states_TLd)))
        # a name may hold anything; streams are labels of limited length
        yield Trace(
            states_TLd[rows],
            reading.split.tokens_T[rows],
            stream=reading.name[:128],
            run="read",
            seq=start,
            fingerprint=made_by,
        )
