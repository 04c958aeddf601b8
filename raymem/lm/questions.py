"""Questions about written text, one JSON object a line.

A line of kind `text` is a part of what a bank is to remember: parts of a stream follow each other, and each stream is
read in a context of its own. A line of kind `question` asks something of a bank; `evidence` names the parts that answer
it by their ids, and `answer` is what a model should say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raymem.errors import InvalidInput, NotFound
from raymem.inputs import TIME_END, shown

_Words = Annotated[str, Field(min_length=1)]


class WrittenText(BaseModel):
    """A part of a stream; `time` is when it was said, in seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text"]
    bank: _Words
    stream: _Words
    id: _Words
    text: _Words
    time: float | None = Field(default=None, ge=0, lt=TIME_END, allow_inf_nan=False)


class AskedQuestion(BaseModel):
    """A question, the answer to it, and the ids of the parts that hold it; none where nothing does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["question"]
    bank: _Words
    text: _Words
    answer: str = ""
    evidence: tuple[str, ...] = ()


@dataclass
class QuestionSet:
    """What one bank is to remember, and what is asked of it: `streams` have their parts in the order of the file."""

    streams: dict[str, list[WrittenText]] = field(default_factory=dict)
    questions: list[AskedQuestion] = field(default_factory=list)


_LINE: TypeAdapter[WrittenText | AskedQuestion] = TypeAdapter(
    Annotated[WrittenText | AskedQuestion, Field(discriminator="kind")]
)


def read_questions(file: Path) -> dict[str, QuestionSet]:
    """Read a file, by bank.

    Raises:
        NotFound: there is none. InvalidInput: a line that can't be read, naming it; an id that is there twice; evidence
            that no text has; a bank with questions and no text; no question at all.
    """
    if not file.is_file():
        raise NotFound(f"no questions at {file}: give a file of one JSON object a line")
    sets: dict[str, QuestionSet] = {}
    known: set[tuple[str, str]] = set()
    for number, line in _lines(file):
        found = sets.setdefault(line.bank, QuestionSet())
        if isinstance(line, AskedQuestion):
            found.questions.append(line)
            continue
        if (line.bank, line.id) in known:
            raise InvalidInput(f"{file}:{number}: id {shown(line.id)} is in bank {shown(line.bank)} already")
        known.add((line.bank, line.id))
        found.streams.setdefault(line.stream, []).append(line)
    if not any(found.questions for found in sets.values()):
        raise InvalidInput(f"{file} asks nothing: give lines of kind 'question'")
    for name, found in sets.items():
        asked = {part for question in found.questions for part in question.evidence}
        if found.questions and not found.streams:
            raise InvalidInput(f"{file}: bank {shown(name)} has questions and no text")
        if missing := sorted(part for part in asked if (name, part) not in known):
            raise InvalidInput(f"{file}: evidence {shown(missing[0])} is no id of a text of bank {shown(name)}")
    return sets


def _lines(file: Path) -> Iterator[tuple[int, WrittenText | AskedQuestion]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, _LINE.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InvalidInput(f"{file}:{number}: {place or 'line'}: {first['msg']}") from error
