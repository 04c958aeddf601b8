"""`raymem bank`: the partitions of a bank. More of them, and evening them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raymem.cli import output
from raymem.cli.bank import Name
from raymem.cli.options import DEFAULT_STORE, ColdOption, JsonOption, StoreOption, opened

if TYPE_CHECKING:
    from raymem.types import RebalanceReport


def add_to(app: typer.Typer) -> None:
    """Give `raymem bank` these commands."""
    for command in (grow, rebalance):
        app.command(command.__name__)(command)


def grow(
    name: Name,
    partitions: Annotated[int, typer.Option("--partitions", help="How many there are to be.")],
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Add empty partitions to a partitioned bank; no stream moves, new ones go where there are fewest.

    For example:

        raymem bank grow team/all --partitions 8 --store ray
    """
    with opened(store, cold) as memory:
        info = memory.bank(name).grow(partitions)
    output.show(
        info, lambda made: f"{made.name} has {len(made.partitions)} partitions; `raymem bank rebalance` evens them"
    )


def rebalance(
    name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False
) -> None:
    """Move streams between partitions until none has much more than its share of the rows.

    They are read and written meanwhile; one that was cut short is finished by the next.

    For example:

        raymem bank rebalance team/all --store ray
    """
    with opened(store, cold) as memory, output.waiting(f"moving streams of {name} …"):
        report = memory.bank(name).rebalance()
    output.show(report, _report)
    if report.failed:
        raise typer.Exit(1)


def _report(report: RebalanceReport) -> str:
    moved = f"{report.bank}: {report.streams:,} streams moved, {report.rows:,} rows, in {report.total_ms / 1e3:.1f} s"
    lines = [f"{moved}; writes of one paused {report.pause_ms:.0f} ms at most"]
    return "\n".join([*lines, *(f"not moved: {stream}: {why}" for stream, why in sorted(report.failed.items()))])
