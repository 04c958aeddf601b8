"""Questions about written text: the file that asks them, and what remembering gives."""

import json

import pytest
from typer.testing import CliRunner

from raymem import Bank
from raymem.cli.app import app
from raymem.errors import InvalidInput, NotFound, RaymemError, Unsupported
from raymem.lm.answering import WAYS, AnswerSettings, evaluate_answers
from raymem.lm.questions import read_questions

NAMES = ["Quillfeather", "Brandywine", "Oddlestone"]


def text(number, words, **others):
    made = {"kind": "text", "bank": "ann", "stream": f"s{number % 2}", "id": f"t{number}", "text": words}
    return json.dumps(made | others)


def question(words, answer, evidence, **others):
    return json.dumps(
        {"kind": "question", "bank": "ann", "text": words, "answer": answer, "evidence": evidence} | others
    )


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def facts(file):
    """Names that no model can guess, said once among other talk."""
    said = [f"Guest {number}: good evening, my name is {name}, and I keep bees." for number, name in enumerate(NAMES)]
    idle = [
        f"Guest {number}: the weather was fine, so we walked along the river for a while." for number in range(3, 9)
    ]
    texts = [text(number, words) for number, words in enumerate(said + idle)]
    asked = [question(f"What is the name of guest {at}?", name, [f"t{at}"]) for at, name in enumerate(NAMES)]
    return file(*texts, *asked, question("Which name was never said?", "", []))


def test_what_was_written_helps_to_answer_as_text_and_attended(facts):
    seen = []
    found = evaluate_answers(AnswerSettings(data=facts, rows=96), lambda done, total: seen.append((done, total)))
    assert (found.questions, seen[-1]) == (3, (3, 3))
    assert set(found.ways) == set(WAYS) == set(found.tokens)
    none = found.ways["none"].nll
    # a name of some tokens that was never seen is unlikely, and one in the prompt is not
    assert all(found.ways[way].nll < none - 1 for way in WAYS[1:])
    assert found.ways["none"].gain == 0
    for way in found.ways.values():
        assert way.interval[0] <= way.nll <= way.interval[1]
    assert found.tokens["none"] == 0
    assert found.tokens["chosen_text"] == found.tokens["chosen_attended"] <= 96
    # the first four rows stand before the evidence's
    assert found.tokens["evidence_text"] < found.tokens["evidence_attended"] <= found.tokens["evidence_text"] + 4


def test_rows_have_the_time_at_which_they_were_said(file, monkeypatch):
    written, write = [], Bank.write

    def watched(self, trace, **how):
        written.append((trace.seq, trace.seq + len(trace), trace.time))
        return write(self, trace, **how)

    monkeypatch.setattr(Bank, "write", watched)
    said = [text(number, f"word {number}", stream="s", time=10.0 * (number // 2)) for number in range(4)]
    evaluate_answers(AnswerSettings(data=file(*said, question("Which?", "word", ["t0"])), rows=8))
    first, second = written
    assert (first[0], first[1], first[2], second[2]) == (0, second[0], 0.0, 10.0)


def test_the_command_prints_and_writes_the_figures(facts, tmp_path):
    out = tmp_path / "qa.json"
    done = CliRunner().invoke(
        app, ["eval", "qa", "--data", str(facts), "--rows", "32", "--most", "1", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    assert figures["questions"] == 1
    assert set(figures["ways"]) == set(WAYS)
    assert figures["ways"]["none"]["interval"] is None
    assert "attended" in done.output


def test_a_kind_that_keeps_no_rows_is_refused(facts):
    with pytest.raises(Unsupported, match="titans"):
        evaluate_answers(AnswerSettings(data=facts, kind="titans"))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([text(0, "a"), "{"], ":2: line: Invalid JSON"),
        ([text(0, "a"), '{"kind": "answer"}'], ":2: line: .*'text', 'question'"),
        ([text(0, "")], ":1: text.text: .*at least 1"),
        ([text(0, "a", time=-1)], ":1: text.time: .*greater than or equal to 0"),
        ([text(0, "a", more=1)], ":1: text.more: Extra"),
        ([text(0, "a"), text(0, "b")], ":2: id 't0' is in bank 'ann' already"),
        ([text(0, "a")], "asks nothing"),
        ([question("q", "a", [])], "bank 'ann' has questions and no text"),
        ([text(0, "a"), question("q", "a", ["t7"])], "evidence 't7' is no id"),
        ([text(0, "a"), question("q", "a", ["t0"], bank="bob")], "bank 'bob' has questions and no text"),
    ],
)
def test_a_file_that_can_not_be_asked_says_where_and_why(file, lines, says):
    with pytest.raises(InvalidInput, match=says):
        read_questions(file(*lines))


def test_questions_that_have_no_answer_are_not_enough(file, tmp_path):
    with pytest.raises(InvalidInput, match="has an answer and evidence"):
        evaluate_answers(AnswerSettings(data=file(text(0, "a"), question("q", "", ["t0"]))))
    with pytest.raises(NotFound, match="missing"):
        read_questions(tmp_path / "missing.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RaymemError, match="not UTF-8"):
        read_questions(tmp_path / "bytes.jsonl")
