"""The figures of an evaluation: perplexities, shares of the gap that was closed, and intervals over documents.

Shape legend: D documents, R resamplings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from torch import Tensor

_RESAMPLINGS, _SEED = 4000, 0
# of documents' resamplings: what is left out on each side
_TAIL = 0.025

Interval = tuple[float, float]
_ATTENDED, _SPEEDS = ("95 %\ninterval", "of what was\nwritten"), ("write\nrows/s", "read\nµs/query")


class Perplexity(BaseModel):
    """Perplexity over all predicted tokens."""

    model_config = ConfigDict(frozen=True)

    ppl: float


class Closed(Perplexity):
    """`gap_closed` is the share of the way from no memory to full context, in nats (None where there is no way to go),
    with its 95 % `interval` from resampled documents (None for a single one). `gap_closed_written` is the share of the
    way to what all written rows give, attended: full context also sees predicted tokens, which no bank was given.
    """

    gap_closed: float | None
    interval: Interval | None = None
    gap_closed_written: float | None = None


class Difference(BaseModel):
    """How much more of the gap is closed than by a baseline, with the interval of the difference over documents."""

    model_config = ConfigDict(frozen=True)

    baseline: str
    gap_closed: float
    interval: Interval | None


class ReadFigures(Closed):
    """One way of reading a bank. `rows` are attended at once and `bytes` what a document's memory holds for it, on
    average: mixing state, and for attended rows the keys and values in int8 of all written ones. `over_text` compares
    with the best causal retrieval of as many tokens of text. `by_rows` has the figures of other numbers of rows. Where
    rows are made, `compaction` says how, and `by_compaction` has the figures of other ways.
    """

    wrong_memory_ratio: float | None
    rows: int
    bytes: int
    over_text: Difference | None = None
    by_rows: dict[str, ReadFigures] = Field(default_factory=dict)
    compaction: str | None = None
    by_compaction: dict[str, ReadFigures] = Field(default_factory=dict)


class BaselineFigures(Closed):
    """Text of `tokens` tokens before the window; `mixed` has a bank of `mixed_kind` mixed into it too. `flattered`: the
    choice knew the text that was predicted.
    """

    tokens: int
    flattered: bool = False
    mixed: Closed | None = None
    mixed_kind: str = ""
    by_rows: dict[str, BaselineFigures] = Field(default_factory=dict)


class KindFigures(Perplexity):
    """One kind of bank: `gap_closed` is the share of the way from no memory to full context, in nats (None where
    there is no way to go); `wrong_memory_ratio` is perplexity with the next document's bank over that without memory
    (None for a single document); `bytes` is what a document's memory holds, on average, and `budget_bytes` what it may:
    rows of a short document don't fill a large budget. `options` are those of each bank that remembers a document.
    These are the figures of mixing; `reads` has each way that was asked for.
    """

    gap_closed: float | None
    wrong_memory_ratio: float | None
    bytes: int
    budget_bytes: int
    options: dict[str, dict[str, Any]]
    write_rows_per_s: float
    read_us_per_query: float
    reads: dict[str, ReadFigures] = Field(default_factory=dict)


class EvalReport(BaseModel):
    """The figures of one evaluation; `written` is what all written rows give, attended, where rows were attended."""

    model_config = ConfigDict(frozen=True)

    base: Perplexity
    full_context: Perplexity
    written: Closed | None = None
    text_retrieval_2x128: Perplexity
    text_retrieval_4x128: Perplexity
    baselines: dict[str, BaselineFigures] = Field(default_factory=dict)
    kinds: dict[str, KindFigures]
    documents: tuple[str, ...]
    predicted_tokens: int
    refresh: int | None = None
    notes: tuple[str, ...] = ()

    def json_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return self.model_dump(mode="json")

    def table(self) -> Table:
        """The figures for people."""
        made = Table(
            title=f"{len(self.documents)} documents, {self.predicted_tokens:,} tokens predicted", title_justify="left"
        )
        made.add_column("memory")
        # 80 columns are too few for all: what attending adds stands in the place of speeds
        attended = self.written is not None
        shared = ("perplexity", "gap\nclosed", "wrong\nmemory", "held,\nMB")
        for name in (*shared, *(_ATTENDED if attended else _SPEEDS)):
            made.add_column(name, justify="right", no_wrap=True)
        plain = {
            "none": self.base,
            "retrieval 2×128, flattered": self.text_retrieval_2x128,
            "retrieval 4×128, flattered": self.text_retrieval_4x128,
        }
        for name, found in plain.items():
            made.add_row(name, f"{found.ppl:.2f}", _number(self._gap(found.ppl), ".2f"))
        for name, baseline in self.baselines.items():
            for each in (*baseline.by_rows.values(), baseline) if not baseline.flattered else ():
                made.add_row(f"{name.replace('_', ' ')}, {each.tokens} tokens", *_closed(each))
                if each.mixed is not None:
                    made.add_row(f"  and {each.mixed_kind} mixed", *_closed(each.mixed))
        for kind, row in self.kinds.items():
            cells = (_number(row.gap_closed, ".2f"), _number(row.wrong_memory_ratio, ".3f"), f"{row.bytes / 1e6:.2f}")
            speeds = (f"{row.write_rows_per_s:,.0f}", f"{row.read_us_per_query:,.0f}")
            made.add_row(kind, f"{row.ppl:.2f}", *cells, *(() if attended else speeds), style="bold")
            for name, read in row.reads.items():
                for way in (*read.by_rows.values(), read) if name != "mix" else ():
                    for how, made_so in ((way.compaction, way), *way.by_compaction.items()):
                        ratio, held = _number(made_so.wrong_memory_ratio, ".3f"), f"{made_so.bytes / 1e6:.2f}"
                        called = f"{kind}, {name}, {way.rows} rows{'' if how is None else f' by {how}'}"
                        made.add_row(called, *_closed(made_so, ratio, held), style="bold")
        if self.written is not None:
            made.add_row("all that was written, attended", *_closed(self.written))
        made.add_row("full context", f"{self.full_context.ppl:.2f}", _number(self._gap(self.full_context.ppl), ".2f"))
        return made

    def _gap(self, ppl: float) -> float | None:
        return gap_closed(self.base.ppl, ppl, self.full_context.ppl)


class Sums(NamedTuple):
    """Losses in nats by document `[D]`: without memory, with full context, and with all written rows attended."""

    base_D: Tensor
    full_D: Tensor
    written_D: Tensor | None
    tokens: int

    def closed(self, found_D: Tensor) -> Closed:
        """The figures of something whose losses these are."""
        ends = [found_D, self.base_D, self.full_D, self.written_D]
        ppl, base, full, written = (None if end is None else math.exp(float(end.sum()) / self.tokens) for end in ends)
        assert ppl is not None
        assert base is not None
        assert full is not None
        return Closed(
            ppl=ppl,
            gap_closed=gap_closed(base, ppl, full),
            interval=self.interval(self.base_D - found_D),
            gap_closed_written=None if written is None else gap_closed(base, ppl, written),
        )

    def interval(self, gain_D: Tensor) -> Interval | None:
        """Of the share of the gap that these gains in nats are: percentiles over resampled documents.

        None for one document, or where full context is not better in nearly all resamplings.
        """
        count = len(gain_D)
        if count < 2:
            return None
        made = torch.Generator().manual_seed(_SEED)
        drawn_RD = torch.randint(count, (_RESAMPLINGS, count), generator=made)
        way_R = (self.base_D - self.full_D).double()[drawn_RD].sum(1)
        if float((way_R <= 0).double().mean()) > _TAIL:
            return None
        share_R = (gain_D.double()[drawn_RD].sum(1) / way_R)[way_R > 0]
        low, high = share_R.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)).tolist()
        return low, high

    def over(self, found_D: Tensor, others: dict[str, Tensor]) -> Difference | None:
        """How much more of the gap is closed than by the best of several baselines, by name."""
        way = float((self.base_D - self.full_D).sum())
        if not others or way <= 0:
            return None
        best = min(others, key=lambda name: float(others[name].sum()))
        gain_D = others[best] - found_D
        return Difference(baseline=best, gap_closed=float(gain_D.sum()) / way, interval=self.interval(gain_D))


def gap_closed(base: float, found: float, full: float) -> float | None:
    """The share of the way from one perplexity to another that was gone, in nats; None where there is none to go."""
    return math.log(base / found) / math.log(base / full) if full < base else None


def by_document(losses: Sequence[tuple[int, Tensor]], documents: int) -> Tensor:
    """Sums `[D]` (float64) of losses that came window by window, each with its document's number."""
    sums_D = torch.zeros(documents, dtype=torch.float64)
    for index, losses_W in losses:
        sums_D[index] += losses_W.double().sum()
    return sums_D


def _closed(found: Closed, ratio: str = "", held: str = "") -> tuple[str, ...]:
    interval = "" if found.interval is None else f"{found.interval[0]:.2f}–{found.interval[1]:.2f}"
    shares = (interval, _number(found.gap_closed_written, ".2f"))
    return (f"{found.ppl:.2f}", _number(found.gap_closed, ".2f"), ratio, held, *shares)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
