"""`raymem eval lm`: what memory is worth to a frozen model on a user's own text, measured with the product's banks.

Shape legend: W rows of a window, V vocabulary.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from torch import Tensor

from raymem import Bank, BankSpec, Store, connect
from raymem.encode.fit import calibrate
from raymem.lm.contenders import Contender, Size, ask, contenders, expanded
from raymem.lm.fingerprint import fingerprint
from raymem.lm.mixing import NEIGHBOURS, Mixer
from raymem.lm.models import BUNDLED_MODEL, LanguageModel
from raymem.lm.passes import Reading, Window, full_context_losses, losses, read, retrieval_losses
from raymem.lm.text import WRITTEN_SHARE, find_documents
from raymem.lm.trust import Trust
from raymem.types import Fingerprint

Progress = Callable[[int, int], None]
# how deep in the model the states are taken: layer 26 of SmolLM2's 30
DEPTH = 26 / 30


class EvalSettings(BaseModel):
    """What to measure.

    `kinds` are kinds of bank, `combined`, or `all`. A bank may hold `budget_mb` million bytes and has the options that
    make the most of them; None leaves each kind its default options and budget. `layers` are 1-based;
    by default the one at 87 % of the model's depth.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[Path, ...]
    model: str = BUNDLED_MODEL
    kinds: tuple[str, ...] = ("spalm", "titans")
    budget_mb: float | None = Field(default=0.15, gt=0)
    max_docs: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=4096, ge=64)
    window: int = Field(default=256, ge=2)
    layers: tuple[int, ...] = ()
    neighbours: int = Field(default=NEIGHBOURS, ge=1, le=4096)


class Perplexity(BaseModel):
    """Perplexity over all predicted tokens."""

    model_config = ConfigDict(frozen=True)

    ppl: float


class KindFigures(Perplexity):
    """One kind of bank: `gap_closed` is the share of the way from no memory to full context, in nats (None where
    there is no way to go); `wrong_memory_ratio` is perplexity with the next document's bank over that without memory
    (None for a single document); `bytes` is what a document's memory holds, on average, and `budget_bytes` what it may:
    rows of a short document don't fill a large budget. `options` are those of each bank that remembers a document.
    """

    gap_closed: float | None
    wrong_memory_ratio: float | None
    bytes: int
    budget_bytes: int
    options: dict[str, dict[str, Any]]
    write_rows_per_s: float
    read_us_per_query: float


class EvalReport(BaseModel):
    """The figures of one evaluation."""

    model_config = ConfigDict(frozen=True)

    base: Perplexity
    full_context: Perplexity
    text_retrieval_2x128: Perplexity
    text_retrieval_4x128: Perplexity
    kinds: dict[str, KindFigures]
    documents: tuple[str, ...]
    predicted_tokens: int

    def json_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return self.model_dump(mode="json")

    def table(self) -> Table:
        """The figures for people."""
        made = Table(
            title=f"{len(self.documents)} documents, {self.predicted_tokens:,} tokens predicted", title_justify="left"
        )
        made.add_column("memory")
        for name in ("perplexity", "gap\nclosed", "wrong\nmemory", "held of\nMB", "write\nrows/s", "read\nµs/query"):
            made.add_column(name, justify="right")
        plain = {
            "none": self.base,
            "retrieval 2×128": self.text_retrieval_2x128,
            "retrieval 4×128": self.text_retrieval_4x128,
        }
        for name, found in plain.items():
            made.add_row(name, f"{found.ppl:.2f}", _number(self._gap(found.ppl), ".2f"))
        for kind, row in self.kinds.items():
            cells = (_number(row.gap_closed, ".2f"), _number(row.wrong_memory_ratio, ".3f"), _megabytes(row))
            speeds = (f"{row.write_rows_per_s:,.0f}", f"{row.read_us_per_query:,.0f}")
            made.add_row(kind, f"{row.ppl:.2f}", *cells, *speeds, style="bold")
        made.add_row("full context", f"{self.full_context.ppl:.2f}", _number(self._gap(self.full_context.ppl), ".2f"))
        return made

    def _gap(self, ppl: float) -> float | None:
        return gap_closed(self.base.ppl, ppl, self.full_context.ppl)


def gap_closed(base: float, found: float, full: float) -> float | None:
    """The share of the way from one perplexity to another that was gone, in nats; None where there is none to go."""
    return math.log(base / found) / math.log(base / full) if full < base else None


def evaluate(settings: EvalSettings, progress: Progress | None = None) -> EvalReport:
    """Measure; eight documents of 4,096 tokens and two kinds take a few minutes on two cores.

    Args:
        settings: what to measure.
        progress: called with documents handled (each is read, then written and predicted) and their number in all.

    Raises:
        InvalidSpec: an unknown kind, or a budget that is too small for one.
        NotFound, InvalidInput: texts that are missing, unreadable or too short. ModelNotFound: no such model.
    """
    # before the model is loaded
    expanded(settings.kinds)
    documents = find_documents(settings.texts, settings.max_docs)
    tell = progress or (lambda _done, _total: None)
    model = LanguageModel.load(settings.model)
    layers = settings.layers or (max(1, round(model.layers * DEPTH)),)
    readings: list[Reading] = []
    for document in documents:
        tell(len(readings), 2 * len(documents))
        readings.append(read(model, document, layers, settings.max_tokens, settings.window))
    with tempfile.TemporaryDirectory() as folder, connect(folder) as store:
        trial = Trial(settings, model, layers, readings, store)
        for index in range(len(readings)):
            tell(len(readings) + index, 2 * len(documents))
            trial.predict(index)
        tell(2 * len(documents), 2 * len(documents))
        return trial.report()


class Trial:
    """The banks of all documents, and the losses gathered so far."""

    def __init__(
        self,
        settings: EvalSettings,
        model: LanguageModel,
        layers: tuple[int, ...],
        readings: list[Reading],
        store: Store,
    ) -> None:
        self._settings, self._model, self._readings = settings, model, readings
        self._mixer = Mixer()
        self._calibration = calibrate(model, layers)
        store.put_calibration(self._calibration)
        self._losses: dict[str, list[Tensor]] = {}
        self._seconds: dict[str, float] = {}
        rows = fingerprint(model, layers, self._calibration.hash)
        self._contenders = {contender.name: contender for contender in self._sized(rows)}
        self._banks = {contender.name: self._write(store, contender) for contender in self._contenders.values()}

    def predict(self, index: int) -> None:
        """Predict one document's windows in every way."""
        reading = self._readings[index]
        for window in reading.windows:
            logits_WV = torch.log_softmax(self._model.logits(window.final_Wd).float(), dim=-1)
            self._keep("base", losses(logits_WV, window.targets_W))
            self._keep("full", full_context_losses(self._model, reading, window))
            for pieces in (2, 4):
                found_W = retrieval_losses(self._model, reading, window, self._calibration, pieces)
                self._keep(f"retrieval {pieces}", found_W)
            for kind, banks in self._banks.items():
                self._keep(kind, self._with_memory(banks[index], window, logits_WV, kind))
                if len(banks) > 1:
                    wrong = banks[(index + 1) % len(banks)]
                    self._keep(f"{kind} wrong", self._with_memory(wrong, window, logits_WV, f"{kind} wrong"))

    def report(self) -> EvalReport:
        """The figures."""
        return EvalReport(
            base=Perplexity(ppl=self._ppl("base")),
            full_context=Perplexity(ppl=self._ppl("full")),
            text_retrieval_2x128=Perplexity(ppl=self._ppl("retrieval 2")),
            text_retrieval_4x128=Perplexity(ppl=self._ppl("retrieval 4")),
            kinds={kind: self._figures(kind) for kind in self._banks},
            documents=tuple(reading.name for reading in self._readings),
            predicted_tokens=sum(len(part) for part in self._losses["base"]),
        )

    def _sized(self, rows: Fingerprint) -> list[Contender]:
        settings = self._settings
        budget = None if settings.budget_mb is None else round(settings.budget_mb * 1e6)
        size = Size(budget, math.ceil(settings.max_tokens * WRITTEN_SHARE))
        return contenders(settings.kinds, BankSpec(kind="spalm", fingerprint=rows), self._calibration, size)

    def _figures(self, kind: str) -> KindFigures:
        banks, base, ppl, contender = self._banks[kind], self._ppl("base"), self._ppl(kind), self._contenders[kind]
        rows, queries = sum(reading.split.written for reading in self._readings), len(torch.cat(self._losses[kind]))
        return KindFigures(
            ppl=ppl,
            gap_closed=gap_closed(base, ppl, self._ppl("full")),
            wrong_memory_ratio=self._ppl(f"{kind} wrong") / base if len(banks) > 1 else None,
            bytes=round(sum(bank.info().bytes for document in banks for bank in document) / len(banks)),
            budget_bytes=contender.budget_bytes,
            options={spec.kind: dict(spec.options) for spec in contender.specs},
            write_rows_per_s=rows / self._seconds[f"{kind} write"],
            read_us_per_query=1e6 * self._seconds[kind] / queries,
        )

    def _write(self, store: Store, contender: Contender) -> list[tuple[Bank, ...]]:
        started = time.perf_counter()
        written = [contender.write(store, place, reading) for place, reading in enumerate(self._readings)]
        self._count(f"{contender.name} write", started)
        return written

    def _with_memory(self, banks: tuple[Bank, ...], window: Window, logits_WV: Tensor, name: str) -> Tensor:
        started = time.perf_counter()
        readouts = ask(banks, window.hidden_WLd, self._settings.neighbours)
        self._count(name, started)
        mixed_W = losses(self._mixer.logits(logits_WV, readouts), window.targets_W)
        # a window is a context of its own: it starts without any experience of the bank
        return Trust().losses(losses(logits_WV, window.targets_W), mixed_W)

    def _count(self, name: str, started: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def _keep(self, name: str, losses_W: Tensor) -> None:
        self._losses.setdefault(name, []).append(losses_W)

    def _ppl(self, name: str) -> float:
        return math.exp(float(torch.cat(self._losses[name]).mean()))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _megabytes(row: KindFigures) -> str:
    return f"{row.bytes / 1e6:.2f}/{row.budget_bytes / 1e6:.2f}"
