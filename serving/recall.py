"""Recall in text: run a question through the bank's model, read the bank, say in words what was found."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from raymem.client.store import AsyncBank
from raymem.errors import FingerprintMismatch, MissingExtra, TooLarge
from raymem.logs import get_logger
from raymem.serving.passages import Piece, pieces
from raymem.serving.schemas import Candidate, RecallAnswer, Span
from raymem.types import DTYPES, Fingerprint, Readout

if TYPE_CHECKING:
    from torch import Tensor

    from raymem.lm.models import LanguageModel

# a question, not a document: its rows are all compared with all of the bank's
MAX_TOKENS = 1024
_NEIGHBOURS = 8
log = get_logger("raymem.recall")


class Reader:
    """One frozen model, loaded on first use and kept; safe to call from several threads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._model: LanguageModel | None = None
        self._lock = threading.Lock()

    def states(self, text: str, fingerprint: Fingerprint) -> Tensor:
        """The text's hidden states [Q, L, D] in the bank's layers and dtype.

        Raises:
            MissingExtra: transformers is not installed.
            FingerprintMismatch: the bank's rows come from another model.
            UnsupportedModel: a family whose states raymem can't have.
            InvalidInput: the text is empty, holds half a character, or has more tokens than the model has positions.
            TooLarge: it has more than `MAX_TOKENS` tokens.
        """
        with self._lock:
            model = self._load()
            self._check(model, fingerprint)
            tokens_Q = model.encode(text)
            model.check_length(len(tokens_Q), "the question")
            if len(tokens_Q) > MAX_TOKENS:
                raise TooLarge(f"the text has {len(tokens_Q)} tokens, more than {MAX_TOKENS}; ask with less")
            states_QLD = model.run(tokens_Q, fingerprint.layers).hidden_TLd
        return states_QLD.to(DTYPES[fingerprint.dtype])

    def text(self, tokens: Tensor) -> str:
        """Token ids as text."""
        model = self._model
        assert model is not None
        return str(model.tokenizer.decode(tokens.tolist()))

    def _load(self) -> LanguageModel:
        if self._model is None:
            from raymem.lm.models import LanguageModel

            log.info("loading model", model=self.name)
            try:
                self._model = LanguageModel.load(self.name)
            except ModuleNotFoundError as error:
                raise MissingExtra(
                    f"recall in text runs a language model, and {error.name!r} is not installed: "
                    "`pip install 'raymem[lm]'`"
                ) from error
        return self._model

    def _check(self, model: LanguageModel, fingerprint: Fingerprint) -> None:
        if not model.made(fingerprint):
            raise FingerprintMismatch(
                f"the bank holds states of {fingerprint.model!r} ({fingerprint.content[:12]}), and the gateway reads "
                f"with {self.name!r} ({model.content_hash[:12]}); set gateway.model to the bank's model"
            )


async def recall(
    bank: AsyncBank,
    reader: Reader,
    text: str,
    k: int,
    as_of: str | float | None = None,
    allow_partial: bool = False,
) -> RecallAnswer:
    """Answer a question in text with the k best spans that a bank holds.

    Args:
        bank: whose memory.
        reader: the model to read the question with.
        text: at most `MAX_TOKENS` tokens.
        k: spans, or candidates for kinds that hold no rows.
        as_of: a tag or time at which the bank is asked; the spans' text is the journal's, and may reach beyond it.
        allow_partial: go without partitions that don't answer in time.
    """
    spec = (await bank.info()).spec
    states_QLD = await asyncio.to_thread(reader.states, text, spec.fingerprint)
    readout = await bank.read(states_QLD, max(k, _NEIGHBOURS), start=0, as_of=as_of, allow_partial=allow_partial)
    found = pieces(readout, k) if readout.pos_Qk is not None else []
    return RecallAnswer(
        bank=bank.name,
        kind=spec.kind,
        provenance=readout.pos_Qk is not None,
        relevance=float(readout.relevance_Q.max()) if len(readout.relevance_Q) else 0.0,
        spans=[await _span(bank, reader, piece) for piece in found],
        candidates=await asyncio.to_thread(_candidates, readout, reader, k),
        missing=list(readout.missing),
    )


async def _span(bank: AsyncBank, reader: Reader, piece: Piece) -> Span:
    tokens = await bank.tokens(piece.stream, piece.run, piece.seq_from, piece.seq_to)
    return Span(
        text=await asyncio.to_thread(reader.text, tokens),
        stream=piece.stream,
        run=piece.run,
        seq_from=piece.seq_from,
        # the run may end before the window does
        seq_to=min(piece.seq_to, piece.seq_from + len(tokens)),
        positions=sorted(piece.positions),
        score=piece.score,
        relevance=piece.relevance,
    )


def _candidates(readout: Readout, reader: Reader, k: int) -> list[Candidate]:
    if readout.tokens_Qk is None or readout.scores_Qk is None:
        return []
    best: dict[int, float] = {}
    pairs = zip(readout.tokens_Qk.flatten().tolist(), readout.scores_Qk.flatten().tolist(), strict=True)
    for token, score in pairs:
        if token >= 0:
            best[token] = max(best.get(token, score), score)
    import torch

    chosen = sorted(best, key=lambda token: best[token], reverse=True)[:k]
    return [Candidate(token=token, text=reader.text(torch.tensor([token])), score=best[token]) for token in chosen]
