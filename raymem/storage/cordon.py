"""Nodes that are being emptied and take no bank until they are released; kept here, to outlive every actor."""

from __future__ import annotations

import time

import pyarrow as pa

from raymem.storage.tables.cas_table import CasTable
from raymem.storage.tables.tables import Tables, quote

_TABLE = "draining"
_SCHEMA = pa.schema([pa.field("node", pa.string(), nullable=False), pa.field("since", pa.float64(), nullable=False)])


class Cordon:
    """The nodes that take no new banks, by the beginning of their Ray id; a node that starts anew has a new one."""

    def __init__(self, tables: Tables) -> None:
        self._table = CasTable(tables, _TABLE, "the list of draining nodes", later=True)

    def begin(self, node: str) -> None:
        """Let a node take no more banks."""
        self._table.create(_SCHEMA.empty_table())
        rows = pa.Table.from_pylist([{"node": node, "since": time.time()}], schema=_SCHEMA)
        self._table.change(
            f"drain node {node}",
            lambda table: table.merge_insert("node").when_not_matched_insert_all().execute(rows),
        )

    def end(self, node: str) -> None:
        """Let a node take banks again."""
        if node in self.nodes():
            self._table.change(f"release node {node}", lambda table: table.delete(f"node = {quote(node)}"))

    def nodes(self) -> frozenset[str]:
        """The nodes that are being emptied, or have been."""
        return frozenset(row["node"] for row in self._table.rows())
