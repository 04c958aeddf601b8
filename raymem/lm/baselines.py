"""What memory is compared with: text before the window, at the same number of tokens.

Shape legend: T tokens, N tokens of a prompt, K chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymem.lm.attended import Part, Question, text_part
from raymem.lm.embedder import Embedder
from raymem.lm.models import LanguageModel
from raymem.lm.passes import CHUNK_TOKENS
from raymem.lm.text import chunks
from raymem.memory.choice import Held, choose


class TextRetrieval:
    """Causal retrieval of a document's written text: the best chunks of 128 for the last tokens before.

    Where there is no question yet the most recent text stands in.

    Args:
        model: whose tokens they are.
        written_T: what may be retrieved.
        rows: tokens of a prompt, cut into whole chunks.
        embedder: compares chunks and question by their meaning; None: by BM25 over token ids.
    """

    def __init__(self, model: LanguageModel, written_T: Tensor, rows: int, embedder: Embedder | None = None) -> None:
        self._model, self._written_T, self._embedder = model, written_T, embedder
        self._rows = min(rows, len(written_T))
        self._chunk = min(CHUNK_TOKENS, self._rows)
        zeros_T = torch.zeros_like(written_T)
        self._held = Held(None, written_T, zeros_T, torch.arange(len(written_T)))

    def pick(self, question: Question) -> Part:
        """The prompt for a question."""
        if not len(question.tokens_Q):
            return recency(self._model, self._written_T, self._rows)
        if self._embedder is not None:
            return text_part(self._model, self._by_meaning(self._embedder, question))
        asked = (self._held, None, question.tokens_Q, self._rows)
        found = choose(*asked, piece=self._chunk, sinks=0, method="bm25")
        if not found.relevance:
            return recency(self._model, self._written_T, self._rows)
        return text_part(self._model, self._written_T[found.place_N])

    def _by_meaning(self, embedder: Embedder, question: Question) -> Tensor:
        spans = chunks(len(self._written_T), self._chunk)
        texts = [self._model.tokenizer.decode(self._written_T[start:stop]) for start, stop in spans]
        asked_1d = embedder.embed([self._model.tokenizer.decode(question.tokens_Q)])
        likeness_K = (embedder.embed(texts) @ asked_1d.T)[:, 0]
        best = sorted(likeness_K.argsort(descending=True)[: max(1, self._rows // self._chunk)].tolist())
        return torch.cat([self._written_T[slice(*spans[index])] for index in best])


def recency(model: LanguageModel, written_T: Tensor, rows: int) -> Part:
    """The last tokens as text."""
    return text_part(model, written_T[-rows:])
