"""`raymem demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the figures here; - for stdout.")] = None,
) -> None:
    """Show the whole of it on this machine: two nodes, a gateway, a real model, a memory that moves between them.

    For example:

        raymem demo

        raymem demo --json figures.json
    """
    from raymem.demo import run

    run(json_)
