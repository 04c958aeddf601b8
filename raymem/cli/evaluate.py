"""`raymem eval`: what memory is worth, in figures."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="What memory is worth to a frozen model, measured.")


@app.callback()
def _group() -> None:
    """What memory is worth to a frozen model, measured."""
