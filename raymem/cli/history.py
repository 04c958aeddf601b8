"""`raymem bank`: a bank's past. Tags, going back, forks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymem.cli import output
from raymem.cli.bank import Name
from raymem.cli.options import DEFAULT_STORE, ColdOption, JsonOption, StoreOption, opened

if TYPE_CHECKING:
    from rich.table import Table

    from raymem.types import MergeReport, RestoreReport

Label = Annotated[str, typer.Argument(help="A tag, for example before-merge.")]
Position = Annotated[int | None, typer.Option("--pos", min=0, help="A position, where there is no tag.")]


def add_to(app: typer.Typer) -> None:
    """Give `raymem bank` these commands."""
    for command in (tags, untag, restore, fork, materialise, merge):
        app.command(command.__name__)(command)


def tags(name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """List a bank's tags and the positions that they name.

    For example:

        raymem bank tags research/alice
    """
    with opened(store, cold) as memory:
        found = memory.bank(name).tags()
    output.show({"bank": name, "tags": found}, _tags)


def untag(
    name: Name, label: Label, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False
) -> None:
    """Forget a tag; the rows stay.

    For example:

        raymem bank untag research/alice before-merge
    """
    with opened(store, cold) as memory:
        left = memory.bank(name).untag(label)
    output.show({"bank": name, "tags": left}, _tags)


def restore(
    name: Name,
    label: Annotated[str | None, typer.Argument(help="The tag to go back to.")] = None,
    pos: Position = None,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Go back to a tag; what came after it stays in a bank of its own.

    For example:

        raymem bank restore research/alice before-merge
    """
    at = _one_of(label, pos)
    if at is None:
        raise typer.BadParameter("say where to: a tag (`raymem bank tags` lists them) or --pos N")
    with opened(store, cold) as memory, output.waiting(f"going back in {name} …"):
        report = memory.bank(name).restore(at)
    output.show(report, _restored)


def fork(
    name: Name,
    target: Annotated[str, typer.Argument(help="The new bank, for example research/bob.")],
    at: Annotated[str | None, typer.Option("--at", help="A tag; the present position by default.")] = None,
    pos: Position = None,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Create a bank that begins with another's rows; none is copied.

    For example:

        raymem bank fork research/alice research/bob

        raymem bank fork research/alice research/bob --at before-merge
    """
    with opened(store, cold) as memory:
        info = memory.fork(name, target, _one_of(at, pos)).info()
    output.show(info, lambda made: f"{made.name} begins with {made.rows:,} rows of {name}")


def materialise(
    name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False
) -> None:
    """Copy to a fork the rows that it reads from its parent, so that the parent can go.

    For example:

        raymem bank materialise research/bob
    """
    with opened(store, cold) as memory, output.waiting(f"copying rows to {name} …"):
        info = memory.bank(name).materialise()
    output.show(info, lambda made: f"{made.name} has all its {made.rows:,} rows itself")


def merge(
    target: Annotated[str, typer.Argument(help="The new bank, for example team/all.")],
    sources: Annotated[list[str], typer.Argument(help="The banks it is made of.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the state of the rows; some kinds need it.")] = False,
    keep_names: Annotated[
        bool, typer.Option("--keep-names", help="Don't put each bank's name before its streams.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Create a bank from the rows of several, in the order of their times.

    For example:

        raymem bank merge team/all research/alice research/bob
    """
    with opened(store, cold) as memory, output.waiting(f"merging into {target} …"):
        report = memory.merge(target, sources, rebuild=rebuild, rename=not keep_names)
    output.show(report, _merged)


def _one_of(label: str | None, pos: int | None) -> str | int | None:
    if label is not None and pos is not None:
        raise typer.BadParameter(f"{label!r} and --pos {pos} are two places: name one")
    return pos if label is None else label


def _tags(found: dict[str, Any]) -> Table:
    return output.table(found["bank"], ["tag", "rows"], list(found["tags"].items()))


def _restored(report: RestoreReport) -> str:
    if report.kept_as is None:
        return f"{report.bank} is at position {report.pos:,} already"
    return (
        f"{report.bank} is back at position {report.pos:,}; the {report.undone:,} rows after it are in {report.kept_as}"
    )


def _merged(report: MergeReport) -> str:
    how = "rebuilt from its rows" if report.rebuilt else f"merged from states ({report.rule})"
    lines = [f"{report.bank}: {report.rows:,} rows of {len(report.sources)} banks, {how}"]
    lines += [f"{report.duplicates:,} rows were in two of them, kept once"] * (report.duplicates > 0)
    lines += [f"{report.conflicts:,} rows left out, their names had other content:"] * (report.conflicts > 0)
    return "\n".join([*lines, *report.conflict_rows])
