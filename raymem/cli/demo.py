"""`raymem demo`."""

from __future__ import annotations

import os

from raymem.cli.options import FileOption


def demo(json_: FileOption = None) -> None:
    """Run all of raymem on this machine: two nodes, a gateway, a real model, a memory that moves between the nodes.

    For example:

        raymem demo

        raymem demo --json figures.json
    """
    # read when torch is imported; what its C++ says of memory would stand between the demo's own lines
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from raymem.cli.play import run

    run(json_)
