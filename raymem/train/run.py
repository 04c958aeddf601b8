"""One training from start to end: a bank's rows in, a file of weights in the cold store out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from raymem.encode.encoder import assemble
from raymem.errors import FingerprintMismatch, InvalidSpec
from raymem.memory.learned import Learned
from raymem.storage.store import ColdStore, Entry
from raymem.train.data import Lessons, lessons_of, require_same
from raymem.train.loop import Progress, Task, TrainingLoop, read_checkpoint
from raymem.types import BankSpec

# the option by which a kind has something to learn and the values that will do, the first being taken otherwise
_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "compressive": ("compressor", ("conv", "dilated_conv")),
    "dct": ("policy", ("learned",)),
    "lemn": ("policy", ("s", "st")),
    "spalm": ("", ()),
}
_STEPS = {"compressive": 400, "dct": 200, "lemn": 150, "spalm": 300}
_RATES = {"compressive": 1e-3, "dct": 3e-3, "lemn": 1e-3, "spalm": 0.02}
_LEAST_ROWS = 640


class TrainSettings(BaseModel):
    """How to train; None is what suits the kind. `goal` is for compressive, `keep_rate` for dct, `model` for spalm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    steps: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_rows: int = Field(default=20_000, ge=_LEAST_ROWS)
    goal: str = Field(default="attention", pattern="^(attention|auto_encoding)$")
    keep_rate: float = Field(default=0.5, gt=0, lt=1)
    model: str | None = None


class TrainReport(BaseModel):
    """The result of a training: the name of the weights, the spec of a bank that uses them, and their figures.

    `figures` are of held-out rows, "trained" beside what needs no training; `metric` says what they mean.
    """

    model_config = ConfigDict(frozen=True)

    params: str
    spec: BankSpec
    bank: str
    rows: int
    held: int
    steps: int
    resumed_from: int
    metric: str
    figures: dict[str, float]


def trainable() -> list[str]:
    """Kinds that learn from a bank's journal."""
    return sorted(_OPTIONS)


def train(
    cold: ColdStore,
    name: str,
    settings: TrainSettings,
    *,
    folder: Path,
    fresh: bool = False,
    every: int = 20,
    progress: Progress | None = None,
) -> TrainReport:
    """Fit a kind's weights on a bank's journal and keep them in the store.

    The bank is only read, and goes on as it is. A run that was cut short goes on from its last checkpoint, to the same
    bits on one machine and number of threads, on the rows that it began with.

    Args:
        cold: the store.
        name: the bank.
        settings: how.
        folder: where checkpoints go; a finished run leaves none.
        fresh: start anew whatever checkpoint there is.
        every: steps between checkpoints.
        progress: called with steps done and steps in all.

    Raises:
        BankNotFound: no such bank. InvalidSpec: it is of another kind. InvalidInput: too few rows.
        Conflict: the rows of an unfinished run are gone. Corrupt: its checkpoint is damaged.
    """
    entry = cold.catalog.get(name)
    spec = _spec(entry, settings)
    steps = settings.steps or _STEPS[settings.kind]
    checkpoint = folder / f"{_digest(entry, settings)}.safetensors"
    if fresh:
        checkpoint.unlink(missing_ok=True)
    begun = read_checkpoint(checkpoint)
    lessons = lessons_of(cold, entry, settings.max_rows, _LEAST_ROWS, None if begun is None else int(begun[0]["end"]))
    if begun is not None:
        require_same(lessons, begun[0]["digest"])
    task = _task(cold, entry, spec, settings, lessons)
    identity = {"end": lessons.end, "digest": lessons.digest}
    loop = TrainingLoop(
        task,
        steps=steps,
        rate=settings.rate or _RATES[settings.kind],
        seed=settings.seed,
        checkpoint=checkpoint,
        every=every,
        identity=identity,
    )
    resumed_from = loop.run(progress)
    figures = task.figures()
    tensors, options = task.learned()
    about = {
        "bank": name,
        "content": spec.fingerprint.content,
        "rows": len(lessons.rows),
        "held": lessons.held,
        "metric": task.metric,
        "figures": figures,
        "settings": settings.model_dump(mode="json"),
    }
    params = cold.params.put(settings.kind, Learned(settings.kind, tensors, options, about).to_bytes())
    checkpoint.unlink(missing_ok=True)
    return TrainReport(
        params=params,
        spec=spec.model_copy(
            update={"params": params, "options": dict(sorted((spec.options | dict(options)).items()))}
        ),
        bank=name,
        rows=len(lessons.rows),
        held=lessons.held,
        steps=steps,
        resumed_from=resumed_from,
        metric=task.metric,
        figures=figures,
    )


def _spec(entry: Entry, settings: TrainSettings) -> BankSpec:
    """The bank's spec with an option that has something to learn, and no weights."""
    if settings.kind not in _OPTIONS:
        raise InvalidSpec(f"{settings.kind!r} learns nothing from a journal; {', '.join(trainable())} do")
    if entry.spec.kind != settings.kind:
        raise InvalidSpec(
            f"bank {entry.name!r} is of kind {entry.spec.kind!r}: name a bank of kind "
            f"{settings.kind!r}; what can be trained is {', '.join(trainable())}"
        )
    option, good = _OPTIONS[settings.kind]
    options = dict(entry.spec.options)
    if option and options.get(option) not in good:
        options[option] = good[0]
        # thresholds of another policy
        options.pop("threshold", None)
    return entry.spec.model_copy(update={"options": dict(sorted(options.items())), "params": ""})


def _task(cold: ColdStore, entry: Entry, spec: BankSpec, settings: TrainSettings, lessons: Lessons) -> Task:
    calibration = cold.calibrations.load(spec.fingerprint.calibration)
    encoder, memory = assemble(spec, calibration)
    if settings.kind == "compressive":
        from raymem.train.compressive import CompressiveTask

        return CompressiveTask(memory, lessons, "attention" if settings.goal == "attention" else "auto_encoding")
    if settings.kind == "dct":
        from raymem.train.dct import DctTask

        return DctTask(memory, lessons, settings.keep_rate)
    if settings.kind == "lemn":
        from raymem.train.lemn import LemnTask

        return LemnTask(memory, lessons)
    from raymem.lm.models import LanguageModel
    from raymem.train.spalm import GateSetup, SpalmTask

    model = LanguageModel.load(settings.model or spec.fingerprint.model)
    if not model.made(spec.fingerprint):
        raise FingerprintMismatch(
            f"model {settings.model or spec.fingerprint.model} has content {model.content_hash[:12]}, and the bank's "
            f"rows were made by {spec.fingerprint.content[:12]}: name that model's folder with --model",
            fields=["content"],
        )
    journal = cold.journal(entry)
    return SpalmTask(GateSetup(memory, encoder, model, journal, spec.fingerprint.layers, lessons.sources), lessons)


def _digest(entry: Entry, settings: TrainSettings) -> str:
    said = json.dumps([entry.id, settings.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:24]
