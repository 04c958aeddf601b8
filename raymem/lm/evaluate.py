"""`raymem eval lm`: what memory is worth to a frozen model on a user's own text, measured with the product's banks.

Shape legend: W rows of a window, V vocabulary.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from raymem import Bank, BankSpec, Store, connect
from raymem.encode.fit import calibrate
from raymem.lm.contenders import Contender, Size, ask, contenders, expanded
from raymem.lm.figures import (
    BaselineFigures,
    EvalReport,
    KindFigures,
    Perplexity,
    ReadFigures,
    Sums,
    by_document,
    gap_closed,
)
from raymem.lm.fingerprint import fingerprint
from raymem.lm.mixing import NEIGHBOURS, Mixer
from raymem.lm.models import BUNDLED_MODEL, LanguageModel
from raymem.lm.passes import CHUNK_TOKENS, Reading, Window, full_context_losses, losses, read, retrieval_losses
from raymem.lm.reads import BASELINES, AttendedReads
from raymem.lm.text import WRITTEN_SHARE, find_documents
from raymem.lm.trust import Trust
from raymem.memory.compress import Compaction
from raymem.types import Fingerprint

Progress = Callable[[int, int], None]
# how deep in the model the states are taken: layer 26 of SmolLM2's 30
DEPTH = 26 / 30
_MIXED_BUDGET, _ATTENDED_BUDGET = 150_000, 1_000_000


class EvalSettings(BaseModel):
    """What to measure.

    `kinds` are kinds of bank, `combined`, or `all`. A bank may hold `budget_mb` million bytes and has the options that
    make the most of them; None leaves each kind its default options and budget. By default that is 0.15 where banks
    are mixed alone, and 1 where rows are attended, whose keys and values take far more. `layers` are 1-based; by
    default the one at 87 % of the model's depth. `reads` are the ways of reading; so many `rows` are attended at once,
    chosen again for every `refresh` predicted tokens. Kinds that show the same rows whatever the question have them
    made in each of the ways `compact`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[Path, ...]
    model: str = BUNDLED_MODEL
    kinds: tuple[str, ...] = ("spalm", "titans")
    budget_mb: float | Literal["default"] | None = "default"
    max_docs: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=4096, ge=64)
    window: int = Field(default=256, ge=2)
    layers: tuple[int, ...] = ()
    neighbours: int = Field(default=NEIGHBOURS, ge=1, le=4096)
    reads: tuple[Literal["mix", "attend", "both"], ...] = Field(default=("mix",), min_length=1)
    rows: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(default=(512,), min_length=1)
    refresh: int = Field(default=32, ge=1)
    compact: tuple[Compaction, ...] = Field(default=("match",), min_length=1)

    @field_validator("budget_mb")
    @classmethod
    def _positive(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float | int) and not 0 < value < math.inf:
            raise ValueError(f"a budget is more than 0 MB, not {value}")
        return value

    @property
    def attended(self) -> bool:
        """Whether rows are attended."""
        return set(self.reads) != {"mix"}

    @property
    def budget_bytes(self) -> int | None:
        """What a bank may hold; None: each kind's default."""
        if self.budget_mb == "default":
            return _ATTENDED_BUDGET if self.attended else _MIXED_BUDGET
        return None if self.budget_mb is None else round(self.budget_mb * 1e6)


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
        # a window's losses with its document's number
        self._losses: dict[str, list[tuple[int, Tensor]]] = {}
        self._seconds: dict[str, float] = {}
        rows = fingerprint(model, layers, self._calibration.hash)
        self._contenders = {contender.name: contender for contender in self._sized(rows)}
        self._banks = {contender.name: self._write(store, contender) for contender in self._contenders.values()}
        self._bytes = {kind: self._held(kind) for kind in self._banks}
        self._attended = AttendedReads(model, layers, readings, self._banks, self._mixer, settings)

    def predict(self, index: int) -> None:
        """Predict one document's windows in every way."""
        reading = self._readings[index]
        for window in reading.windows:
            logits_WV = torch.log_softmax(self._model.logits(window.final_Wd).float(), dim=-1)
            self._keep(index, "base", losses(logits_WV, window.targets_W))
            self._keep(index, "full", full_context_losses(self._model, reading, window))
            for pieces in self._oracle_pieces():
                found_W = retrieval_losses(self._model, reading, window, self._calibration, pieces)
                self._keep(index, f"retrieval {pieces}", found_W)
            for kind, banks in self._banks.items():
                self._keep(index, kind, self._with_memory(banks[index], window, logits_WV, kind))
                if len(banks) > 1:
                    wrong = banks[(index + 1) % len(banks)]
                    self._keep(index, f"{kind} wrong", self._with_memory(wrong, window, logits_WV, f"{kind} wrong"))
            if self._settings.attended:
                for name, losses_W in self._attended.predict(index, window, logits_WV):
                    self._keep(index, name, losses_W)

    def report(self) -> EvalReport:
        """The figures."""
        sums, attended = self._sums(), self._settings.attended
        return EvalReport(
            base=Perplexity(ppl=self._ppl("base")),
            full_context=Perplexity(ppl=self._ppl("full")),
            written=sums.closed(sums.written_D) if sums.written_D is not None else None,
            text_retrieval_2x128=Perplexity(ppl=self._ppl("retrieval 2")),
            text_retrieval_4x128=Perplexity(ppl=self._ppl("retrieval 4")),
            baselines=self._baselines(sums) if attended else {},
            kinds={kind: self._figures(kind, sums) for kind in self._banks},
            documents=tuple(reading.name for reading in self._readings),
            predicted_tokens=sums.tokens,
            refresh=self._settings.refresh if attended else None,
            notes=self._attended.notes if attended else (),
        )

    def _sums(self) -> Sums:
        written_D = self._by_document("written") if "written" in self._losses else None
        tokens = sum(len(part) for _, part in self._losses["base"])
        return Sums(self._by_document("base"), self._by_document("full"), written_D, tokens)

    def _baselines(self, sums: Sums) -> dict[str, BaselineFigures]:
        """Every baseline at the most rows, and under `by_rows` at the other numbers."""
        made = {}
        for name in (*BASELINES, "text_oracle"):
            found = {rows: self._baseline(name, rows, sums) for rows in sorted(self._settings.rows)}
            there = {rows: figures for rows, figures in found.items() if figures is not None}
            if there:
                most = max(there)
                others = {str(rows): figures for rows, figures in there.items() if rows != most}
                made[name] = there[most].model_copy(update={"by_rows": others})
        return made

    def _baseline(self, name: str, rows: int, sums: Sums) -> BaselineFigures | None:
        oracle = name == "text_oracle"
        place = f"retrieval {_pieces(rows)}" if oracle else f"{name} {rows}"
        if place not in self._losses:
            return None
        closed, mixed = sums.closed(self._by_document(place)), None
        if f"{place} mixed" in self._losses:
            mixed = sums.closed(self._by_document(f"{place} mixed"))
        return BaselineFigures(
            **closed.model_dump(),
            tokens=_pieces(rows) * CHUNK_TOKENS if oracle else rows,
            flattered=oracle,
            mixed=mixed,
            mixed_kind=self._attended.mixed_kind if mixed is not None else "",
        )

    def _reads(self, kind: str, sums: Sums) -> dict[str, ReadFigures]:
        made: dict[str, ReadFigures] = {}
        for way in self._settings.reads:
            if way == "mix":
                made[way] = self._read(kind, kind, 0, sums)
            elif f"{kind} {way} {max(self._settings.rows)}" in self._losses:
                found = {rows: self._attended_read(kind, way, rows, sums) for rows in self._settings.rows}
                most = max(found)
                others = {str(rows): figures for rows, figures in sorted(found.items()) if rows != most}
                made[way] = found[most].model_copy(update={"by_rows": others})
        return made

    def _attended_read(self, kind: str, way: str, rows: int, sums: Sums) -> ReadFigures:
        """Rows that are chosen, or made in the first way of those asked for, and below it in the others."""
        found = {
            how: self._read(kind, f"{kind} {form.format(way)}", rows, sums)
            for form, how in self._attended.forms(kind, rows).items()
        }
        (first, figures), *others = found.items()
        return figures.model_copy(update={"compaction": first, "by_compaction": dict(others)})

    def _read(self, kind: str, name: str, rows: int, sums: Sums) -> ReadFigures:
        found_D = self._by_document(name)
        texts = {each: f"{each} {rows}" for each in ("text_bm25", "text_embedder")}
        others = {each: self._by_document(place) for each, place in texts.items() if place in self._losses}
        wrong = f"{name} wrong"
        mixing = self._bytes[kind]
        # attended banks also hold the states that a choice compares
        held = self._held(kind) - (mixing if f" attend {rows}" in name else 0) if rows else mixing
        return ReadFigures(
            **sums.closed(found_D).model_dump(),
            wrong_memory_ratio=self._ppl(wrong) / self._ppl("base") if wrong in self._losses else None,
            rows=rows,
            bytes=round(held + (self._attended.bytes(kind, rows) if rows else 0)),
            over_text=sums.over(found_D, others),
        )

    def _sized(self, rows: Fingerprint) -> list[Contender]:
        settings = self._settings
        size = Size(settings.budget_bytes, math.ceil(settings.max_tokens * WRITTEN_SHARE))
        return contenders(settings.kinds, BankSpec(kind="spalm", fingerprint=rows), self._calibration, size)

    def _figures(self, kind: str, sums: Sums) -> KindFigures:
        banks, base, ppl, contender = self._banks[kind], self._ppl("base"), self._ppl(kind), self._contenders[kind]
        rows, queries = sum(reading.split.written for reading in self._readings), sums.tokens
        return KindFigures(
            ppl=ppl,
            gap_closed=gap_closed(base, ppl, self._ppl("full")),
            wrong_memory_ratio=self._ppl(f"{kind} wrong") / base if len(banks) > 1 else None,
            bytes=round(self._bytes[kind]),
            budget_bytes=contender.budget_bytes,
            options={spec.kind: dict(spec.options) for spec in contender.specs},
            write_rows_per_s=rows / self._seconds[f"{kind} write"],
            read_us_per_query=1e6 * self._seconds[kind] / queries,
            reads=self._reads(kind, sums),
        )

    def _held(self, kind: str) -> float:
        banks = self._banks[kind]
        return sum(bank.info().bytes for document in banks for bank in document) / len(banks)

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

    def _oracle_pieces(self) -> tuple[int, ...]:
        return tuple({2, 4, *map(_pieces, self._settings.rows)}) if self._settings.attended else (2, 4)

    def _keep(self, index: int, name: str, losses_W: Tensor) -> None:
        self._losses.setdefault(name, []).append((index, losses_W))

    def _by_document(self, name: str) -> Tensor:
        return by_document(self._losses[name], len(self._readings))

    def _ppl(self, name: str) -> float:
        return math.exp(float(torch.cat([losses_W for _, losses_W in self._losses[name]]).mean()))


def _pieces(rows: int) -> int:
    """How many whole chunks of text are as many tokens."""
    return max(1, rows // CHUNK_TOKENS)
