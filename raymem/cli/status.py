"""`raymem status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raymem.cli import output
from raymem.cli.options import DEFAULT_STORE, ColdOption, JsonOption, StoreOption, opened

if TYPE_CHECKING:
    from rich.console import Group


def status(store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """Show a store at a glance: its nodes, its banks, what they hold.

    For example:

        raymem status

        raymem status --store http://127.0.0.1:8765 --json
    """
    with opened(store, cold) as memory:
        found = {"store": store, "nodes": memory.nodes(), "banks": memory.banks(), "stats": memory.stats()}
    output.show(found, _render)


def _render(found: dict[str, Any]) -> Group:
    from rich.console import Group

    banks, stats = found["banks"], found["stats"]
    hot = sum(bank.state == "hot" for bank in banks)
    lines = [
        f"store    {found['store']} ({stats.get('backend', 'unknown')}, cold store {stats.get('cold', 'unknown')})",
        f"nodes    {', '.join(found['nodes'])}",
        f"banks    {len(banks)}, {hot} attached",
        f"rows     {sum(bank.rows for bank in banks):,}",
        f"memory   {output.size(sum(bank.bytes for bank in banks))}",
    ]
    rows = [
        [bank.name, bank.spec.kind, bank.state, bank.node or "", bank.rows, output.size(bank.bytes)] for bank in banks
    ]
    return Group(*lines, output.table("", ["bank", "kind", "state", "node", "rows", "memory"], rows) if rows else "")
