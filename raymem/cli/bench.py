"""`raymem bench`: what memory costs and how fast it comes back, with peers in the same run."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymem.cli import output
from raymem.cli.options import DEFAULT_MODEL, FileOption, ModelOption

if TYPE_CHECKING:
    from rich.table import Table

    from raymem.bench.leaks import Leaks
    from raymem.bench.vllm import ServingFigures


class Sync(Enum):
    """Whether commits are synced to disk."""

    DISK = "disk"
    NONE = "none"


app = typer.Typer(no_args_is_help=True, help="What memory costs, measured beside its peers.")


@app.callback()
def _group() -> None:
    """What memory costs, measured beside its peers."""


@app.command("durability")
def durability(
    only: Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="Only this; repeatable.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="The disk to measure on; where temporary files go by default.")
    ] = None,
    sync: Annotated[Sync, typer.Option("--sync", help="For raymem and for its peers.")] = Sync.DISK,
    repeats: Annotated[int, typer.Option("--repeats", help="Times each way is taken; medians are shown.")] = 5,
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes: to see that it runs, not for figures.")] = False,
    json_: FileOption = None,
) -> None:
    """How fast memory is written, attached, moved, forked and recovered, beside LanceDB and Ray alone.

    Each figure says what its peer took in the same run. Figures of Ray start nodes of their own on this machine.

    For example:

        raymem bench durability --json figures.json

        raymem bench durability --only recovery --sync none
    """
    from raymem.bench import durability as figures

    with output.progress("measuring durability") as report:
        found = figures.run(only or (), folder=folder, sync=sync.value, small=small, repeats=repeats, report=report)
    output.give(found, _table(found), json_)


@app.command("erasure")
def erasure(
    model: ModelOption = DEFAULT_MODEL,
    layer: Annotated[int, typer.Option("--layer", help="Whose outputs are written, counted from 1.")] = 26,
    seed: Annotated[int, typer.Option("--seed", help="Of the passages and of the secrets.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A quarter of a minute: to see that it runs.")] = False,
    json_: FileOption = None,
) -> None:
    """How much of an erased sentence the later rows of its run give away, beside chance.

    Sentences with a name, a number and rare words are written among real text and erased, with each scope. Then a
    probe trained on other texts, and a search with the model's states of every candidate, guess which one it was. Takes
    three minutes on two cores. docs/erasure.md says what the figures mean.

    For example:

        raymem bench erasure --json leaks.json
    """
    import tempfile

    from raymem.bench import leaks
    from raymem.lm.models import LanguageModel

    sizes = dataclasses.replace(leaks.SMALL if small else leaks.LeakSizes(), layer=layer, seed=seed)
    with output.progress("reading passages") as report, tempfile.TemporaryDirectory() as folder:
        found = leaks.run(LanguageModel.load(model), Path(folder), sizes, report)
    output.give(dataclasses.asdict(found), _leaks(found), json_)


@app.command("vllm")
def vllm(
    model: ModelOption = DEFAULT_MODEL,
    layer: Annotated[int, typer.Option("--layer", help="Whose outputs are streamed, counted from 1.")] = 26,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times each mode is taken; medians are shown.")] = 7,
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes: to see that it runs, not for figures.")] = False,
    json_: FileOption = None,
) -> None:
    """What memory costs a vLLM engine: tokens a second, and time to first token, with and without it.

    Engines with and without raymem take turns in every round: answering plainly, with states extracted, streaming to a
    bank, mixing from one, attending to one, and reading as much text. Takes about ten minutes on two cores.

    For example:

        raymem bench vllm --json vllm.json
    """
    import tempfile

    from raymem.bench import vllm as figures

    sizes = dataclasses.replace(figures.SMALL if small else figures.ServingSizes(), rounds=rounds)
    with output.progress("serving") as report, tempfile.TemporaryDirectory() as folder:
        found = figures.run(model, (layer,), Path(folder), sizes, report)
    output.give(dataclasses.asdict(found), _served(found), json_)


def _served(found: ServingFigures) -> Table:
    ratios = {name: value for name, value in vars(found).items() if isinstance(value, float)}
    rows = [[name, f"{value:.3f}", ""] for name, value in ratios.items()]
    rows += [
        [name, f"{mode['median']:.4g}", f"{mode['least']:.4g} to {mode['most']:.4g}"]
        for name, mode in found.modes.items()
    ]
    return output.table("vLLM", ["figure", "median", "rounds"], rows)


def _leaks(found: Leaks) -> Table:
    rows = [
        [f'{name}, scope="{scope}"', distance, f"{hit.top1:.3f}", f"{hit.auc:.3f}"]
        for name, attack in (("linear probe", found.probe), ("nearest neighbour", found.nearest))
        for scope, hits in attack.items()
        for distance, hit in hits.items()
    ]
    rows.append(["guessing", "", f"{found.chance:.3f}, by luck up to {found.bound:.3f}", "0.500"])
    return output.table(
        f"which sentence was erased, {found.documents} times",
        ["attack on what is left", "rows later", "first guess right", "AUC"],
        rows,
    )


def _table(found: dict[str, Any]) -> Table:
    shown = {name: value for name, value in found.items() if name != "details" and value is not None}
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in shown.items()]
    for figure, details in found["details"].items():
        rows += [[f"{figure}: {name}", f"{value:.4g}"] for name, value in details.items() if isinstance(value, float)]
    return output.table("durability", ["figure", "measured"], rows)
