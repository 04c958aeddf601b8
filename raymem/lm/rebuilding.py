"""Keys and values of a bank's rows, rebuilt by the model from the runs' tokens, where the bank keeps none.

Shape legend: `L` attention layers, `N` rows, `H` key/value heads, `d` head width, `T` tokens of a run.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raymem.errors import Conflict, InvalidInput
from raymem.lm.attending import Rope, rebuild
from raymem.rows import AttendedRows
from raymem.types import MemoryTokens

if TYPE_CHECKING:
    from raymem.client.bank import Bank
    from raymem.lm.models import LanguageModel

# a bank's name, a stream and a run in it
_Run = tuple[str, str, str]


@dataclass(frozen=True)
class _Rebuilt:
    """A run's tokens, and the position-free keys and values that the model makes of them."""

    tokens_T: Tensor
    keys_LTHd: Tensor
    values_LTHd: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens_T, self.keys_LTHd, self.values_LTHd))


class Rebuilder:
    """Fills memory tokens by one causal pass over each run up to its last row that was chosen.

    What was rebuilt is kept; the least recently used runs are dropped first.

    Args:
        model: the one that the bank's rows were written with.
        limit_bytes: what all that is kept may take. A run that alone takes more is rebuilt at each use.
    """

    def __init__(self, model: LanguageModel, limit_bytes: int = 2**30) -> None:
        if limit_bytes < 0:
            raise InvalidInput(f"limit_bytes is {limit_bytes}; give 0 or more")
        self._model = model
        self._limit = limit_bytes
        self._kept: OrderedDict[_Run, _Rebuilt] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(each.nbytes for each in self._kept.values())

    def fill(self, memory: MemoryTokens, bank: Bank) -> MemoryTokens:
        """Rows that a bank chose (`bank.attend`), with keys and values; as they are where they have them.

        Raises:
            InvalidInput: a run has more tokens than the model has positions for.
            UnsupportedModel: the model's positions are not those of a rotary embedding with fixed frequencies.
            Conflict: rows were erased since they were chosen.
        """
        if memory.keys_LNHd is not None or not len(memory):
            return memory
        found: dict[str, Any] = {}
        for source, (stream, run) in enumerate(memory.sources):
            slot_N = torch.nonzero(memory.source_N == source)[:, 0]
            index_N, rebuilt = self._rows(bank, stream, run, memory.seq_N[slot_N])
            if not torch.equal(rebuilt.tokens_T[index_N], memory.tokens_N[slot_N]):
                raise _erased(stream, run)
            for name, rows_LTHd in (("keys_LNHd", rebuilt.keys_LTHd), ("values_LNHd", rebuilt.values_LTHd)):
                if name not in found:
                    found[name] = rows_LTHd.new_empty(rows_LTHd.shape[0], len(memory), *rows_LTHd.shape[2:])
                found[name][:, slot_N] = rows_LTHd[:, index_N]
        return replace(memory, **found)

    def _rows(self, bank: Bank, stream: str, run: str, seq_N: Tensor) -> tuple[Tensor, _Rebuilt]:
        """Where rows are among their run's, and the run up to the last of them."""
        end = int(seq_N.max()) + 1
        tokens_T = bank.tokens(stream, run, 0, end)
        index_N = seq_N
        if len(tokens_T) < end:
            # rows are missing before them: erased, or never written
            index_N = torch.cat([_places(bank, stream, run, part) for part in _consecutive(seq_N.tolist())])
            if int(index_N.max()) >= len(tokens_T):
                raise _erased(stream, run)
        key = (bank.name, stream, run)
        kept = self._kept.pop(key, None)
        if kept is None or not torch.equal(kept.tokens_T[: len(tokens_T)], tokens_T):
            kept = _Rebuilt(tokens_T, *rebuild(self._model, tokens_T))
        self._keep(key, kept)
        return index_N, kept

    def _keep(self, key: _Run, rebuilt: _Rebuilt) -> None:
        if rebuilt.nbytes > self._limit:
            return
        self._kept[key] = rebuilt
        total = self.nbytes
        while total > self._limit:
            _, oldest = self._kept.popitem(last=False)
            total -= oldest.nbytes


def rows_of(model: LanguageModel, bank: Bank, stream: str, run: str, seq_to: int) -> AttendedRows:
    """Keys and values of a run's rows before `seq_to`, rebuilt, as `bank.put_rows` takes them.

    Raises:
        InvalidInput: a row is missing, or there are more than the model has positions for.
    """
    tokens_T = bank.tokens(stream, run, 0, seq_to)
    if len(tokens_T) < seq_to:
        raise InvalidInput(f"stream {stream!r} run {run!r} has {len(tokens_T)} of the rows before {seq_to}; name fewer")
    keys_LNHd, values_LNHd = rebuild(model, tokens_T)
    return AttendedRows(stream, run, 0, keys_LNHd, values_LNHd, rope=rope_name(model.rope))


def rope_name(rope: Rope) -> str:
    """What says how a model turns its keys: equal for models that turn them alike."""
    turned = hashlib.sha256(rope.frequencies_LF.contiguous().numpy().tobytes()).hexdigest()[:16]
    return f"{'neighbours' if rope.interleaved else 'halves'} {turned}"


def _erased(stream: str, run: str) -> Conflict:
    return Conflict(f"rows of stream {stream!r} run {run!r} were erased since they were chosen: choose again")


def _consecutive(seqs: list[int]) -> list[list[int]]:
    parts = groupby(enumerate(seqs), key=lambda each: each[1] - each[0])
    return [[seq for _, seq in part] for _, part in parts]


def _places(bank: Bank, stream: str, run: str, seqs: list[int]) -> Tensor:
    """Where rows that follow one another are among their run's."""
    before = len(bank.tokens(stream, run, 0, seqs[0]))
    return torch.arange(before, before + len(seqs))
