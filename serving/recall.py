"""Recall in text: run a question through the bank's model, read the bank, answer with the text around its rows."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raymem.client.store import AsyncBank
from raymem.errors import FingerprintMismatch, MissingExtra, TooLarge
from raymem.logs import get_logger
from raymem.serving.schemas import Candidate, RecallAnswer, Span
from raymem.types import DTYPES, Fingerprint, Readout, RowRef

if TYPE_CHECKING:
    from torch import Tensor

    from raymem.lm.models import LanguageModel

# a question, not a document: each of its rows is compared with all of the bank's
MAX_TOKENS = 1024
_NEIGHBOURS = 8
# rows of text before and after a matched row
BEFORE = 16
AFTER = 24
# joining neighbours stops at so many rows, because common words match everywhere
LONGEST = 128
log = get_logger("raymem.recall")


@dataclass
class Passage:
    """Rows `seq_from` to `seq_to` (exclusive) of one run, and the matches inside them.

    `best` has, for each query, its relevance times its best cosine. Their sum ranks passages, so that one that matches
    many words of the question comes before one that matches a single common word.
    """

    stream: str
    run: str
    seq_from: int
    seq_to: int
    positions: set[int] = field(default_factory=set)
    score: float = -1.0
    relevance: float = 0.0
    best: dict[int, float] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better."""
        return sum(self.best.values()), self.score

    def add(self, match: Match) -> None:
        """Add a match."""
        self.seq_to = min(self.seq_from + LONGEST, max(self.seq_to, match.row.seq + AFTER))
        self.positions.add(match.row.pos)
        self.score = max(self.score, match.score)
        self.relevance = max(self.relevance, match.relevance)
        self.best[match.query] = max(self.best.get(match.query, 0.0), match.relevance * match.score)


@dataclass(frozen=True)
class Match:
    """One row found by one query."""

    query: int
    row: RowRef
    score: float
    relevance: float


def find_passages(readout: Readout, k: int) -> list[Passage]:
    """The k best passages around a readout's rows, best first; neighbouring rows share a passage."""
    by_run: defaultdict[tuple[str, str], list[Match]] = defaultdict(list)
    for match in _matches(readout):
        by_run[match.row.stream, match.row.run].append(match)
    found = [passage for matches in by_run.values() for passage in _merge(matches)]
    return sorted(found, key=lambda passage: passage.rank, reverse=True)[:k]


def _matches(readout: Readout) -> list[Match]:
    assert readout.scores_Qk is not None
    relevance = readout.relevance_Q.tolist()
    return [
        Match(query, row, score, relevance[query])
        for query, scores in enumerate(readout.scores_Qk.tolist())
        for row, score in zip(readout.rows(query), scores, strict=False)
    ]


def _merge(matches: list[Match]) -> list[Passage]:
    found: list[Passage] = []
    for match in sorted(matches, key=lambda match: match.row.seq):
        row = match.row
        # neighbours whose windows overlap are one passage
        if not found or row.seq - BEFORE > found[-1].seq_to or row.seq >= found[-1].seq_from + LONGEST:
            # passages don't overlap
            start = found[-1].seq_to if found else 0
            found.append(Passage(row.stream, row.run, max(start, row.seq - BEFORE), row.seq + AFTER))
        found[-1].add(match)
    return found


class RecallModel:
    """The frozen model that reads questions, loaded on first use and kept; safe to call from several threads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._model: LanguageModel | None = None
        self._lock = threading.Lock()

    def states(self, text: str, fingerprint: Fingerprint) -> Tensor:
        """The text's hidden states [Q, L, D] in the bank's layers and dtype.

        Raises:
            MissingExtra: transformers is not installed.
            FingerprintMismatch: the bank's rows come from another model.
            UnsupportedModel: a family whose states raymem can't read.
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
    model: RecallModel,
    text: str,
    k: int,
    as_of: str | float | None = None,
    allow_partial: bool = False,
) -> RecallAnswer:
    """Answer a question in text with the k best spans that a bank holds.

    Args:
        bank: the bank.
        model: the model to read the question with.
        text: at most `MAX_TOKENS` tokens.
        k: spans, or candidates for kinds that hold no rows.
        as_of: a tag or time at which the bank is asked; the spans' text is the journal's, and may reach beyond it.
        allow_partial: answer without partitions that don't answer in time.
    """
    spec = (await bank.info()).spec
    states_QLD = await asyncio.to_thread(model.states, text, spec.fingerprint)
    readout = await bank.read(states_QLD, max(k, _NEIGHBOURS), start=0, as_of=as_of, allow_partial=allow_partial)
    found = find_passages(readout, k) if readout.pos_Qk is not None else []
    return RecallAnswer(
        bank=bank.name,
        kind=spec.kind,
        provenance=readout.pos_Qk is not None,
        relevance=float(readout.relevance_Q.max()) if len(readout.relevance_Q) else 0.0,
        spans=[await _span(bank, model, passage) for passage in found],
        candidates=await asyncio.to_thread(_candidates, readout, model, k),
        missing=list(readout.missing),
    )


async def _span(bank: AsyncBank, model: RecallModel, passage: Passage) -> Span:
    tokens = await bank.tokens(passage.stream, passage.run, passage.seq_from, passage.seq_to)
    return Span(
        text=await asyncio.to_thread(model.text, tokens),
        stream=passage.stream,
        run=passage.run,
        seq_from=passage.seq_from,
        # the run may end before the window does
        seq_to=min(passage.seq_to, passage.seq_from + len(tokens)),
        positions=sorted(passage.positions),
        score=passage.score,
        relevance=passage.relevance,
    )


def _candidates(readout: Readout, model: RecallModel, k: int) -> list[Candidate]:
    if readout.tokens_Qk is None or readout.scores_Qk is None:
        return []
    best: dict[int, float] = {}
    pairs = zip(readout.tokens_Qk.flatten().tolist(), readout.scores_Qk.flatten().tolist(), strict=True)
    for token, score in pairs:
        if token >= 0:
            best[token] = max(best.get(token, score), score)
    import torch

    chosen = sorted(best, key=lambda token: best[token], reverse=True)[:k]
    return [Candidate(token=token, text=model.text(torch.tensor([token])), score=best[token]) for token in chosen]
