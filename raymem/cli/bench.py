"""`raymem bench`: what memory costs and how fast it comes back, with peers in the same run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymem.cli import output
from raymem.cli.options import FileOption

if TYPE_CHECKING:
    from rich.table import Table


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


def _table(found: dict[str, Any]) -> Table:
    shown = {name: value for name, value in found.items() if name != "details" and value is not None}
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in shown.items()]
    for figure, details in found["details"].items():
        rows += [[f"{figure}: {name}", f"{value:.4g}"] for name, value in details.items() if isinstance(value, float)]
    return output.table("durability", ["figure", "measured"], rows)
