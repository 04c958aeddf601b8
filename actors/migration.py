"""Moving a hot bank from one shard to another while it is read and written."""

from __future__ import annotations

import time

from raymem.actors.calls import Peer
from raymem.errors import Unavailable
from raymem.moving import MovingHost
from raymem.types import MigrationReport

# a tail this short is applied in the time that a hand-over takes anyway
_SHORT_ROWS = 256
_ROUNDS = 16


async def move(name: str, source: MovingHost, to: str, target: Peer) -> MigrationReport:
    """Hand a bank over: copy it, let the copy catch up, stop writes, let the target claim it.

    Reads are answered throughout; writes wait during the hand-over and then hear `Moved`. The source drives this: if it
    dies, the catalog still names it, or already the target.

    Args:
        name: the bank.
        source: the host that owns it.
        to: the target's name in the catalog.
        target: the shard it goes to.

    Raises:
        Moved: it is being moved already.
        RaymemError: the target failed; the source has the bank back and serves it.
    """
    began = time.perf_counter()
    try:
        await _copy(name, source, target)
        paused = time.perf_counter()
        yielded = await source.yield_writes(name, to)
    except Exception:
        await _abandon(name, target)
        raise
    try:
        rows = await target.call("adopt", name, yielded)
    except Exception:
        await source.resume(name)
        await _abandon(name, target)
        raise
    pause_s = time.perf_counter() - paused
    await source.forget_moved(name)
    total_s = time.perf_counter() - began
    return MigrationReport(name, source.owner, to, rows=rows, pause_ms=1e3 * pause_s, total_ms=1e3 * total_s)


async def _copy(name: str, source: MovingHost, target: Peer) -> None:
    # each round copies what was written during the last; a writer as fast as the copy would never let it end
    reached = await target.call("prepare", name)
    for _ in range(_ROUNDS):
        await source.settle(name)
        before, reached = reached, await target.call("prepare", name)
        if reached - before <= _SHORT_ROWS:
            return


async def _abandon(name: str, target: Peer) -> None:
    try:
        await target.call("abandon", name)
    except Unavailable:
        # a target that is gone holds nothing
        return
