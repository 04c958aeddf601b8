"""`raymem eval`: what memory is worth, in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raymem.cli import output
from raymem.cli.options import DEFAULT_MODEL, FileOption, ModelOption, checked, parse_layers

app = typer.Typer(no_args_is_help=True, help="What memory is worth to a frozen model, measured.")


@app.callback()
def _group() -> None:
    """What memory is worth to a frozen model, measured."""


@app.command("lm")
def lm(
    more: Annotated[list[Path] | None, typer.Argument(help="More texts.", metavar="[FILE_OR_DIR]...")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Files, or folders of files; each file is a document.", metavar="FILE_OR_DIR..."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    kind: Annotated[str, typer.Option("--kind", help="all, or for example spalm,titans.")] = "spalm,titans",
    budget_mb: Annotated[
        str,
        typer.Option(
            "--budget-mb",
            help="What a bank may hold, in million bytes; by default 0.15, or 1 where rows are attended; none: each "
            "kind's default options and budget.",
            metavar="NUMBER|none",
        ),
    ] = "default",
    reads: Annotated[str, typer.Option("--reads", help="Ways of reading: mix, attend, both.", metavar="WAY,…")] = "mix",
    rows: Annotated[
        str, typer.Option("--rows", help="How many rows are attended at once; several, by comma.", metavar="N,…")
    ] = "512",
    compact: Annotated[
        str,
        typer.Option(
            "--compact",
            help="How kinds that compress make their rows: match, subsample, mean; several, by comma.",
            metavar="WAY,…",
        ),
    ] = "match",
    refresh: Annotated[int, typer.Option("--refresh", help="Predicted tokens after which rows are chosen anew.")] = 32,
    max_docs: Annotated[int, typer.Option("--max-docs", help="The first documents, in name order.")] = 8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="The first tokens of each document.")] = 4096,
    window: Annotated[int, typer.Option("--window", help="Tokens that are predicted together.")] = 256,
    layers: Annotated[str | None, typer.Option("--layers", help="For keys; the one at 87 % of the depth.")] = None,
    json_: FileOption = None,
) -> None:
    """What memory is worth to a frozen language model on your own text.

    Three quarters of each document are written to a fresh bank; the rest is predicted in windows that see nothing
    earlier: without memory, with it, with another document's bank, with retrieved text, with the full context.
    Banks of all kinds get the same bytes, and the options that make the most of them. `combined`, which comes with
    `all`, is several banks behind one gate.

    `--reads mix,attend,both` also lets the model attend to rows of the banks, chosen from the tokens before, and
    compares that with as many tokens of retrieved text.

    For example:

        raymem eval lm --text notes/ --kind spalm,titans --json out.json

        raymem eval lm --text notes/ --kind spalm,compressive --reads mix,attend,both --rows 256,512

        raymem eval lm --text notes/ --kind all --budget-mb 1

        raymem eval lm --text a.txt b.txt --model path/to/model
    """
    paths = [*(text or []), *(more or [])]
    if not paths:
        raise typer.BadParameter("name at least one file or folder", param_hint="--text")
    from raymem.lm.evaluate import EvalSettings, evaluate

    fields = {
        **{"texts": tuple(paths), "model": model, "kinds": tuple(kind.split(","))},
        "budget_mb": None if budget_mb == "none" else budget_mb,
        **{"max_docs": max_docs, "max_tokens": max_tokens, "window": window},
        "layers": parse_layers(layers) if layers else (),
        **{"reads": tuple(reads.split(",")), "rows": tuple(rows.split(",")), "refresh": refresh},
        "compact": tuple(compact.split(",")),
    }
    settings = checked(EvalSettings, fields)
    with output.progress("reading, then predicting") as report:
        found = evaluate(settings, report)
    output.give(found.json_dict(), found.table(), json_)
    for note in found.notes:
        output.say(note)


@app.command("qa")
def qa(
    data: Annotated[Path, typer.Option("--data", help="Texts and questions, one JSON object a line.", metavar="FILE")],
    model: ModelOption = DEFAULT_MODEL,
    kind: Annotated[str, typer.Option("--kind", help="Of the banks that remember the texts.")] = "spalm",
    rows: Annotated[int, typer.Option("--rows", help="How many rows are chosen for a question.")] = 512,
    method: Annotated[str, typer.Option("--method", help="By what they are: bm25, states, fused.")] = "bm25",
    most: Annotated[
        int | None, typer.Option("--most", help="The first questions of each bank; all by default.")
    ] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="For keys; the one at 87 % of the depth.")] = None,
    json_: FileOption = None,
) -> None:
    """How likely a frozen language model finds the answers to questions about text that a bank remembers.

    Each stream of text is read in a context of its own. Then every question is asked without memory, behind its
    evidence as text, attending to the evidence's rows, behind what the bank chooses as text, and attending to that.

    A line of the file is a part of a text or a question:

        {"kind": "text", "bank": "ann", "stream": "monday", "id": "m1", "text": "Ann: I'm allergic to nuts."}

        {"kind": "question", "bank": "ann", "text": "What can't Ann eat?", "answer": "nuts", "evidence": ["m1"]}

    For example:

        raymem eval qa --data questions.jsonl --rows 512 --json qa.json
    """
    from raymem.lm.answering import AnswerSettings, evaluate_answers

    fields = {"data": data, "model": model, "kind": kind, "method": method, "rows": rows, "most": most}
    settings = checked(AnswerSettings, fields | {"layers": parse_layers(layers) if layers else ()})
    with output.progress("asking") as report:
        found = evaluate_answers(settings, report)
    output.give(found.model_dump(mode="json"), found.table(), json_)
