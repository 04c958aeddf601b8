"""Agent B: how well a frozen model predicts a text that it sees only in short windows, with and without a bank.

Shape legend: T tokens of a window, Q tokens of a question, L layers, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymem import Bank
from raymem.errors import BankDetached
from raymem.lm.attended import QUESTION_TOKENS, Question
from raymem.lm.attending import AttendedContext
from raymem.lm.baselines import TextRetrieval
from raymem.lm.mixing import NEIGHBOURS, Mixer
from raymem.lm.models import LanguageModel
from raymem.lm.rebuilding import Rebuilder
from raymem.types import ChoiceMethod, MemoryTokens

WINDOW = 256
# rows that are attended, or tokens of text before a window, and after how many tokens they are chosen anew
ROWS, REFRESH = 512, 64


@dataclass(frozen=True)
class TextWindow:
    """One stretch of text: its tokens `[T]`, and states `[T - 1, L, D]` and logits `[T - 1, V]` before all but the
    first of them.
    """

    tokens_T: Tensor
    hidden_TLD: Tensor
    logits_TV: Tensor


class AgentB:
    """Predicts a text in windows that see nothing earlier; the model alone runs over each once."""

    def __init__(self, model: LanguageModel, tokens_T: Tensor, layers: tuple[int, ...]) -> None:
        self._model, self._layers = model, layers
        self._mixer = Mixer()
        self._rebuilder = Rebuilder(model)
        self._windows = [self._alone(piece) for piece in torch.split(tokens_T, WINDOW) if len(piece) > 1]

    def perplexity(self, bank: Bank | None) -> float:
        """Perplexity of the text with the bank's candidates mixed in; a detached bank is no memory."""
        return _perplexity(self._windows, [self._mixed(window, bank) for window in self._windows])

    def attending(self, bank: Bank) -> tuple[float, float]:
        """Perplexity while the model attends to rows that the bank chooses, and with its candidates mixed in too."""

        def choose(question: Question) -> MemoryTokens:
            method: ChoiceMethod = "fused" if question.hidden_QLd is not None else "even"
            memory = bank.attend(question.hidden_QLd, question.tokens_Q, ROWS, method=method)
            return self._rebuilder.fill(memory, bank)

        behind = [self._behind(window, choose) for window in self._windows]
        return _perplexity(behind, [window.logits_TV for window in behind]), _perplexity(
            behind, [self._mixed(window, bank) for window in behind]
        )

    def with_text(self, read_T: Tensor) -> float:
        """Perplexity behind the best of this text, as many tokens as rows would be, found by BM25."""
        retrieval = TextRetrieval(self._model, read_T, ROWS)
        behind = [self._behind(window, lambda asked: retrieval.pick(asked).load()) for window in self._windows]
        return _perplexity(behind, [window.logits_TV for window in behind])

    def _mixed(self, window: TextWindow, bank: Bank | None) -> Tensor:
        if bank is None:
            return window.logits_TV
        try:
            readout = bank.read(window.hidden_TLD, NEIGHBOURS, start=0)
        except BankDetached:
            return window.logits_TV
        return self._mixer.logits(window.logits_TV, readout)

    def _behind(self, window: TextWindow, choose: Callable[[Question], MemoryTokens]) -> TextWindow:
        """The window read behind memory, which is chosen anew as it goes on, from its earlier tokens alone."""
        context, hidden, final = AttendedContext(self._model), list[Tensor](), list[Tensor]()
        for start in range(0, len(window.tokens_T), REFRESH):
            asked = slice(max(0, start - QUESTION_TOKENS), start)
            states_QLD = torch.cat(hidden)[asked] if hidden else None
            memory = choose(Question(states_QLD, window.tokens_T[asked]))
            done = context.extend(memory, window.tokens_T[start : start + REFRESH], self._layers)
            hidden.append(done.hidden_TLd)
            final.append(done.final_Td)
        logits_TV = self._model.logits(torch.cat(final)[:-1]).float()
        return TextWindow(window.tokens_T, torch.cat(hidden)[:-1], logits_TV)

    def _alone(self, tokens_T: Tensor) -> TextWindow:
        hidden_TLD, logits_TV = self._model.forward(tokens_T, self._layers)
        return TextWindow(tokens_T, hidden_TLD[:-1], logits_TV[:-1].float())


def _perplexity(windows: Sequence[TextWindow], logits: Sequence[Tensor]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(logits_TV, window.tokens_T[1:], reduction="none")
        for window, logits_TV in zip(windows, logits, strict=True)
    ]
    return math.exp(float(torch.cat(losses).mean()))
