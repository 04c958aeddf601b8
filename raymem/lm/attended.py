"""Windows that are read behind memory: rows of a bank, or retrieved text, chosen again as the window goes on.

A choice is causal: it is made from the tokens of the window before the ones that are predicted next. The window's own
keys and values stay as they were computed when another choice comes, as in an engine.

Shape legend: W tokens of a window, Q tokens of a question, N rows, L layers, d width, H key and value heads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from raymem.lm.attending import AttendedContext, rebuild
from raymem.lm.compacting import compacted
from raymem.lm.identity import cache_folder, write_atomically
from raymem.lm.models import LanguageModel, Pass
from raymem.memory.compress import Compaction
from raymem.types import MemoryTokens

# the last tokens that a choice is made from
QUESTION_TOKENS = 64


class Question(NamedTuple):
    """The last tokens of a window so far, and their states; none before its first token."""

    hidden_QLd: Tensor | None
    tokens_Q: Tensor


class Part(NamedTuple):
    """What the next tokens of a window attend to: a name of its content, and how to get it where it is needed."""

    name: str
    load: Callable[[], MemoryTokens]


Pick = Callable[[Question], Part]


class Written:
    """Rows of a text that was read in one pass, rebuilt when they are first needed."""

    def __init__(self, model: LanguageModel, tokens_T: Tensor) -> None:
        self._model, self.tokens_T = model, tokens_T
        self._name = _digest(tokens_T)
        self._compacted: dict[str, MemoryTokens] = {}

    def part(self, place_N: Tensor) -> Part:
        """Some of its rows, by their places in the text, in this order."""
        return Part(f"{self._name}:{_digest(place_N)}", lambda: self.memory(place_N))

    def whole(self) -> Part:
        """All of its rows."""
        return self.part(torch.arange(len(self.tokens_T)))

    def memory(self, place_N: Tensor) -> MemoryTokens:
        """Some of its rows, with keys and values in the model's dtype."""
        keys_LTHd, values_LTHd = self.rows
        source_N, rows = torch.zeros_like(place_N), (keys_LTHd[:, place_N], values_LTHd[:, place_N])
        return MemoryTokens(place_N, self.tokens_T[place_N], place_N, source_N, (("text", "0"),), 1.0, "", *rows)

    def compacted(self, kept_T: Tensor, rows: int, how: Compaction) -> Part:
        """Rows made of those that a bank keeps (bool, of the text's tokens), the same ones for every question."""
        name = f"{how} {rows} of {_digest(kept_T)}, compaction-1"

        def load() -> MemoryTokens:
            if name not in self._compacted:
                self._compacted[name] = compacted(self._model, [self.tokens_T], rows, how, kept_T=kept_T)
            return self._compacted[name]

        return Part(f"{self._name}:{name}", load)

    def bytes(self, rows: int | None = None) -> int:
        """What keys and values of so many of its rows hold in int8, with their scales; None: of all."""
        keys_LTHd, values_LTHd = self.rows
        count = len(self.tokens_T) if rows is None else rows
        return sum(
            (each[:, :1].numel() + each.shape[0] * each.shape[2] * 4) * count for each in (keys_LTHd, values_LTHd)
        )

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[L, T, H, d]`."""
        return rebuild(self._model, self.tokens_T)


def text_part(model: LanguageModel, tokens_N: Tensor) -> Part:
    """A text that stands before the window: what its own pass leaves behind is what the window attends to."""
    return Written(model, tokens_N).whole()


def read_behind(model: LanguageModel, tokens_W: Tensor, layers: Sequence[int], pick: Pick, refresh: int) -> Pass:
    """A pass over a window, whose every `refresh` tokens attend to what is picked for them.

    Args:
        model: the one that made the rows.
        tokens_W: of the window.
        layers: which layers' outputs to keep.
        pick: called with the question so far before each part, in order.
        refresh: tokens of a part.
    """
    context, done = _KeptContext(model, layers), list[Pass]()
    for part_Q in torch.split(tokens_W, refresh):
        hidden_QLd = torch.cat([each.hidden_TLd for each in done])[-QUESTION_TOKENS:] if done else None
        read = sum(len(each.final_Td) for each in done)
        question = Question(hidden_QLd, tokens_W[max(0, read - QUESTION_TOKENS) : read])
        done.append(context.extend(pick(question), part_Q))
    return Pass(*(torch.cat(kind) for kind in zip(*done, strict=True)))


class _KeptContext:
    """An attended context whose passes are kept on disk: the model runs only from the first one that is not there."""

    def __init__(self, model: LanguageModel, layers: Sequence[int]) -> None:
        self._model, self._layers = model, layers
        self._key = json.dumps([model.content_hash, str(model.dtype), list(layers), "attended-1"])
        self._context = AttendedContext(model)
        self._ahead: list[tuple[Part, Tensor]] = []

    def extend(self, part: Part, tokens_Q: Tensor) -> Pass:
        self._key = hashlib.sha256(f"{self._key} {part.name} {_digest(tokens_Q)}".encode()).hexdigest()
        file = cache_folder() / "passes" / f"{self._key}.safetensors"
        self._ahead.append((part, tokens_Q))
        # not there, cleared just now, or damaged: it is made again
        with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError):
            kept = load_file(file)
            return Pass(kept["hidden"], kept["final"])
        for each, tokens in self._ahead:
            done = self._context.extend(each.load(), tokens, self._layers)
        self._ahead.clear()
        write_atomically(file, save({"hidden": done.hidden_TLd.contiguous(), "final": done.final_Td.contiguous()}))
        return done


def _digest(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
