"""`raymem demo`."""

from __future__ import annotations

from raymem.cli.options import FileOption


def demo(json_: FileOption = None) -> None:
    """Run all of raymem on this machine: two nodes, a gateway, a real model, a memory that moves between the nodes.

    For example:

        raymem demo

        raymem demo --json figures.json
    """
    from raymem.cli.play import run

    run(json_)
