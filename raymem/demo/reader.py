"""Agent B: how well a frozen model predicts a text that it sees only in short windows, with and without a bank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raymem import Bank
from raymem.errors import BankDetached
from raymem.lm.mixing import NEIGHBOURS, Mixer
from raymem.lm.models import LanguageModel

WINDOW = 256


@dataclass(frozen=True)
class TextWindow:
    """One stretch of text the model sees alone: states [T, L, D] and logits [T, V] before each of `targets_T`."""

    hidden_TLD: Tensor
    logits_TV: Tensor
    targets_T: Tensor


class AgentB:
    """Predicts a text in windows that see nothing earlier; it runs the model once over each."""

    def __init__(self, model: LanguageModel, tokens_T: Tensor, layers: tuple[int, ...]) -> None:
        self._mixer = Mixer()
        pieces = [piece for piece in torch.split(tokens_T, WINDOW) if len(piece) > 1]
        self._windows = [self._pass(model, piece, layers) for piece in pieces]

    def perplexity(self, bank: Bank | None) -> float:
        """Perplexity of the text with what the bank remembers; a detached bank is no memory."""
        losses = [self._loss(window, bank) for window in self._windows]
        return math.exp(float(torch.cat(losses).mean()))

    def _loss(self, window: TextWindow, bank: Bank | None) -> Tensor:
        logits_TV = window.logits_TV
        if bank is not None:
            try:
                readout = bank.read(window.hidden_TLD, NEIGHBOURS, start=0)
            except BankDetached:
                pass
            else:
                logits_TV = self._mixer.logits(logits_TV, readout)
        return torch.nn.functional.cross_entropy(logits_TV, window.targets_T, reduction="none")

    @staticmethod
    def _pass(model: LanguageModel, tokens_T: Tensor, layers: tuple[int, ...]) -> TextWindow:
        hidden_TLD, logits_TV = model.forward(tokens_T, layers)
        return TextWindow(hidden_TLD[:-1], logits_TV[:-1].float(), tokens_T[1:])
