"""`python -m raymem.actors stop`: end raymem on the running Ray cluster; banks stay in the cold store."""

from __future__ import annotations

import asyncio
import sys

from raymem.actors import cluster


def main() -> None:
    """Flush every bank, then end shards and directory."""
    if sys.argv[1:] != ["stop"]:
        sys.exit(__doc__)
    cluster.join("ray")
    asyncio.run(cluster.stop())
    cluster.leave()


if __name__ == "__main__":
    main()
