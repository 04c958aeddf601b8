"""`raymem shard`: the processes that host hot banks, and draining a node."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymem.cli import output
from raymem.cli.options import DEFAULT_STORE, ColdOption, JsonOption, StoreOption, opened

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from raymem.client.store import Store
    from raymem.types import DrainReport, ShardInfo

app = typer.Typer(no_args_is_help=True, help="List the shards that host hot banks, and drain a node.")
_LOOK_S = 0.2


@app.command("list")
def list_(store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """List the shards: where each is, what it holds, what it may hold.

    For example:

        raymem shard list --store ray
    """
    with opened(store, cold) as memory:
        found = memory.shards()
    output.show(found, _table)


@app.command("drain")
def drain(
    node: Annotated[str, typer.Argument(help="The node's name, as `raymem shard list` shows it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let the node take banks again; none comes back.")] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Move every bank away from a node, while they are read and written; it takes no new ones until --undo.

    For example:

        raymem shard drain node-2 --store ray

        raymem shard drain node-2 --store ray --undo
    """
    with opened(store, cold) as memory:
        report = memory.drain(node, undo=True) if undo else _drain(memory, node)
    output.show(report, _report)
    if report.failed:
        raise typer.Exit(1)


def _drain(memory: Store, node: str) -> DrainReport:
    with output.progress(f"draining {node}") as show, ThreadPoolExecutor(1) as pool:
        total = _banks(memory.shards(), node)
        done = pool.submit(memory.drain, node)
        while not done.done():
            show(max(0, total - _banks(memory.shards(), node)), total)
            time.sleep(_LOOK_S)
        return done.result()


def _banks(shards: list[ShardInfo], node: str) -> int:
    return sum(shard.banks for shard in shards if shard.node == node)


def _table(shards: list[ShardInfo]) -> Table:
    columns = ["node", "shard", "banks", "loaded", "memory", "of", "pinned", ""]
    return output.table("", columns, [_row(shard) for shard in shards])


def _row(shard: ShardInfo) -> list[Any]:
    limit = "no limit" if shard.memory_bytes is None else output.size(shard.memory_bytes)
    sizes = [output.size(shard.bytes), limit, output.size(shard.pinned_bytes)]
    return [shard.node, shard.name, shard.banks, shard.loaded, *sizes, "draining" if shard.draining else ""]


def _report(report: DrainReport) -> Group:
    from rich.console import Group

    if not report.draining:
        return Group(f"{report.node} takes banks again")
    rows = [
        [move.bank, move.target, move.rows, f"{move.pause_ms:.0f} ms", f"{move.total_ms:.0f} ms"]
        for move in report.moved
    ]
    lines = [
        f"{len(report.moved)} banks moved away from {report.node} in {report.total_ms / 1e3:.1f} s",
        f"it takes no new ones until `raymem shard drain {report.node} --undo`",
        *(f"not moved: {name}: {why}" for name, why in sorted(report.failed.items())),
    ]
    return Group(*([output.table("", ["bank", "to", "rows", "paused", "took"], rows)] if rows else []), *lines)
