"""`raymem eval qa`: how likely a frozen model finds the answers to questions about text that a bank remembers.

Shape legend: T tokens, N rows, A tokens of an answer, S questions, R resamplings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from torch import Tensor

from raymem import Bank, BankSpec, connect
from raymem.encode.fit import calibrate
from raymem.errors import InvalidInput
from raymem.lm.attending import attend_pass
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import BUNDLED_MODEL, LanguageModel
from raymem.lm.passes import losses
from raymem.lm.questions import AskedQuestion, QuestionSet, read_questions
from raymem.lm.rebuilding import Rebuilder
from raymem.memory.choice import SINKS
from raymem.rows import Trace
from raymem.types import ChoiceMethod, MemoryTokens

# what the model reads before it answers, in every way the same
ASKED = "\nQuestion: {}\nAnswer:"
WAYS = ("none", "evidence_text", "evidence_attended", "chosen_text", "chosen_attended")
# as in `raymem eval lm`
_DEPTH = 26 / 30
# each stream is one
_RUN = "read"
_RESAMPLINGS, _SEED, _TAIL = 4000, 0, 0.025


class AnswerSettings(BaseModel):
    """What to measure: the questions of `data`, with so many `rows` chosen for each; the first `most` of each bank.

    `method` is that of `Bank.attend`. Fused with states a bank also decides whether it has to do with a question, which
    a short one often seems not to have: BM25 always answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    model: str = BUNDLED_MODEL
    kind: str = "spalm"
    method: ChoiceMethod = "bm25"
    rows: int = Field(default=512, ge=1, le=2**16)
    most: int | None = Field(default=None, ge=1)
    layers: tuple[int, ...] = ()


class AnswerFigures(BaseModel):
    """One way of remembering: the answers' negative log-likelihood in nats a token, with a 95 % interval over
    questions, and what that is less than without memory.
    """

    model_config = ConfigDict(frozen=True)

    nll: float
    interval: tuple[float, float] | None
    gain: float
    gain_interval: tuple[float, float] | None


class AnswerReport(BaseModel):
    """The figures of one evaluation; `tokens` are how many stood before a question, on average, by way."""

    model_config = ConfigDict(frozen=True)

    questions: int
    answer_tokens: int
    rows: int
    ways: dict[str, AnswerFigures]
    tokens: dict[str, float]

    def table(self) -> Table:
        """The figures for people."""
        made = Table(title=f"{self.questions} questions, {self.answer_tokens} tokens of answers", title_justify="left")
        made.add_column("memory")
        for name in ("tokens", "nats a token", "95 % interval", "gain", "its interval"):
            made.add_column(name, justify="right")
        for way, found in self.ways.items():
            cells = (f"{found.nll:.2f}", _shown(found.interval), f"{found.gain:+.2f}", _shown(found.gain_interval))
            made.add_row(way.replace("_", ", "), f"{self.tokens[way]:.0f}", *cells)
        return made


def evaluate_answers(
    settings: AnswerSettings, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> AnswerReport:
    """Measure: each question alone, with its evidence, and with what its bank chooses; as text, and attended.

    Only questions with an answer and evidence count.

    Args:
        settings: what to measure.
        progress: called with questions done and their number.

    Raises:
        NotFound, InvalidInput: no file, a line that can't be read, no question that counts, or a stream of more tokens
            than the model has positions for. ModelNotFound: no such model. UnsupportedModel: one that can't attend.
    """
    sets = read_questions(settings.data)
    asked = {name: _counting(found, settings.most) for name, found in sets.items()}
    total = sum(map(len, asked.values()))
    if not total:
        raise InvalidInput(f"no question of {settings.data} has an answer and evidence: give some both")
    model = LanguageModel.load(settings.model)
    layers = settings.layers or (max(1, round(model.layers * _DEPTH)),)
    calibration = calibrate(model, layers)
    found: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    tokens = dict.fromkeys(WAYS, 0)
    with tempfile.TemporaryDirectory() as folder, connect(folder) as store:
        store.put_calibration(calibration)
        made = fingerprint(model, layers, calibration.hash)
        for number, (name, questions) in enumerate(asked.items()):
            if not questions:
                continue
            bank = store.create(f"eval/{number}", BankSpec(kind=settings.kind, fingerprint=made))
            remembered = Remembered(model, layers, sets[name], bank)
            for question in questions:
                progress(len(found["none"]), total)
                for way, losses_A, before in remembered.ask(question, settings.rows, settings.method):
                    found[way].append(losses_A)
                    tokens[way] += before
        progress(total, total)
    return _report(found, tokens, settings.rows)


class _Stream(NamedTuple):
    """A stream's tokens, and where those of its parts lie, end exclusive, by their ids."""

    tokens_T: Tensor
    parts: dict[str, tuple[int, int]]


class Remembered:
    """A bank that holds all streams of a question set, each read in one pass of its own.

    Args:
        model: reads and answers.
        layers: whose states the bank holds.
        texts: what is remembered.
        bank: an empty one.
    """

    def __init__(self, model: LanguageModel, layers: tuple[int, ...], texts: QuestionSet, bank: Bank) -> None:
        self._model, self._layers, self._bank = model, layers, bank
        self._rebuilder = Rebuilder(model)
        self._streams: dict[str, _Stream] = {}
        for name, parts in texts.streams.items():
            encoded = [model.encode(part.text + "\n") for part in parts]
            ends = list(accumulate(map(len, encoded)))
            places = {part.id: (end - len(own), end) for part, own, end in zip(parts, encoded, ends, strict=True)}
            tokens_T = torch.cat(encoded)
            model.check_length(len(tokens_T), f"stream {name!r}")
            read = model.trace(tokens_T, layers, stream=name, run=_RUN)
            for time, said in groupby(parts, lambda part: part.time):
                found = [places[part.id] for part in said]
                bank.write(_between(read, found[0][0], found[-1][1], time))
            self._streams[name] = _Stream(tokens_T, places)

    def ask(self, question: AskedQuestion, rows: int, method: ChoiceMethod) -> Iterator[tuple[str, Tensor, int]]:
        """Each way with the losses `[A]` of the answer's tokens, and how many tokens stood before the question."""
        asked_T = self._model.encode(ASKED.format(question.text))
        # what is the same in every question matches nothing
        words_T = self._model.encode(question.text)
        answer_A = self._model.encode(" " + question.answer.strip())
        hidden_QLd = self._model.run(words_T, self._layers).hidden_TLd
        chosen = self._rebuilder.fill(self._bank.attend(hidden_QLd, words_T, rows, method=method), self._bank)
        evidence = self._rebuilder.fill(self._evidence(question, SINKS), self._bank)
        said = self._evidence(question, 0)
        before = {
            "none": (None, asked_T[:0]),
            "evidence_text": (None, said.tokens_N),
            "evidence_attended": (evidence, asked_T[:0]),
            "chosen_text": (None, chosen.tokens_N),
            "chosen_attended": (chosen, asked_T[:0]),
        }
        for way, (memory, text_T) in before.items():
            read_T = torch.cat([text_T, asked_T, answer_A])[:-1]
            if memory is None:
                done = self._model.run(read_T, self._layers)
            else:
                done = attend_pass(self._model, memory, read_T, self._layers)
            logits_AV = self._model.logits(done.final_Td[-len(answer_A) :])
            yield way, losses(logits_AV, answer_A), len(text_T) + (0 if memory is None else len(memory))

    def _evidence(self, question: AskedQuestion, sinks: int) -> MemoryTokens:
        """The rows of the parts that hold the answer, in order, behind the first rows of the first one's stream."""
        sources: list[tuple[str, str]] = []
        found: list[tuple[int, int, int]] = []
        for name, (tokens_T, parts) in self._streams.items():
            spans = [parts[part] for part in question.evidence if part in parts]
            if not spans:
                continue
            spans += [] if sources else [(0, min(sinks, len(tokens_T)))]
            rows = sorted({at for start, stop in spans for at in range(start, stop)})
            found += [(len(sources), at, int(tokens_T[at])) for at in rows]
            sources.append((name, _RUN))
        source_N, seq_N, tokens_N = torch.tensor(found, dtype=torch.int64).T
        return MemoryTokens(torch.full_like(seq_N, -1), tokens_N, seq_N, source_N, tuple(sources), 1.0)


def _between(read: Trace, start: int, stop: int, time: float | None) -> Trace:
    """Rows of a pass, with the time at which they were said, if it is known."""
    part = replace(read, hidden=read.hidden[start:stop], tokens=read.tokens[start:stop], seq=start)
    return part if time is None else replace(part, time=time)


def _counting(texts: QuestionSet, most: int | None) -> list[AskedQuestion]:
    return [question for question in texts.questions if question.answer.strip() and question.evidence][:most]


def _report(found: dict[str, list[Tensor]], tokens: dict[str, int], rows: int) -> AnswerReport:
    count_S = torch.tensor([len(losses_A) for losses_A in found["none"]], dtype=torch.float64)
    sums = {way: torch.stack([losses_A.double().sum() for losses_A in each]) for way, each in found.items()}
    ways = {
        way: AnswerFigures(
            nll=float(sum_S.sum() / count_S.sum()),
            interval=_interval(sum_S, count_S),
            gain=float((sums["none"] - sum_S).sum() / count_S.sum()),
            gain_interval=_interval(sums["none"] - sum_S, count_S),
        )
        for way, sum_S in sums.items()
    }
    before = {way: total / len(count_S) for way, total in tokens.items()}
    return AnswerReport(questions=len(count_S), answer_tokens=int(count_S.sum()), rows=rows, ways=ways, tokens=before)


def _interval(sum_S: Tensor, count_S: Tensor) -> tuple[float, float] | None:
    """Percentiles of a mean a token over resampled questions; None for a single question."""
    if len(sum_S) < 2:
        return None
    drawn_RS = torch.randint(len(sum_S), (_RESAMPLINGS, len(sum_S)), generator=torch.Generator().manual_seed(_SEED))
    mean_R = sum_S[drawn_RS].sum(1) / count_S[drawn_RS].sum(1)
    low, high = mean_R.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)).tolist()
    return low, high


def _shown(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
