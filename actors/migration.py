"""Moving a hot bank from one shard to another while it is read and written."""

from __future__ import annotations

import time

from raymem.actors.calls import Peer, ask, watched
from raymem.errors import Unavailable
from raymem.host.handover import MovingHost
from raymem.types import MigrationReport

# a tail this short is applied in the time that a handover takes anyway
_SHORT_ROWS = 256
_ROUNDS = 16


async def move(name: str, source: MovingHost, to: str, target: Peer) -> MigrationReport:
    """Hand a bank over: copy it, let the copy catch up, stop writes, let the target claim it.

    Reads are answered throughout; writes wait during the handover and then hear `Moved`. The source drives this: if it
    dies, the catalog still names it, or already the target.

    Args:
        name: the bank.
        source: the host that owns it.
        to: the target's name in the catalog.
        target: the shard it goes to.

    Raises:
        Moved: it is being moved already.
        BackendUnavailable: the target died, or was silent for a lease.
        RaymemError: the target failed. It has the bank if it had claimed it by then; otherwise the source goes on.
    """
    began = time.perf_counter()
    silence_s = source.settings.host.lease_s
    try:
        await _copy(name, source, target, silence_s)
        paused = time.perf_counter()
        yielded = await source.yield_writes(name, to)
    except BaseException:
        await _abandon(name, target, silence_s)
        raise
    try:
        rows = await watched(target, "adopt", name, yielded, silence_s=silence_s)
    # a cancellation must not leave writes waiting for ever
    except BaseException:
        await source.resume(name)
        await _abandon(name, target, silence_s)
        raise
    pause_s = time.perf_counter() - paused
    await source.forget_moved(name)
    total_s = time.perf_counter() - began
    return MigrationReport(name, source.owner, to, rows=rows, pause_ms=1e3 * pause_s, total_ms=1e3 * total_s)


async def _copy(name: str, source: MovingHost, target: Peer, silence_s: float) -> None:
    # each round copies what was written during the last; a writer as fast as the copy would never let it end
    reached = await watched(target, "prepare", name, silence_s=silence_s)
    for _ in range(_ROUNDS):
        if await source.quiesce(name) - reached <= _SHORT_ROWS:
            return
        reached = await watched(target, "prepare", name, silence_s=silence_s)


async def _abandon(name: str, target: Peer, silence_s: float) -> None:
    try:
        await ask(target, "abandon", name, timeout_s=silence_s / 3)
    except Unavailable:
        # a target that is gone holds nothing, one that is silent hears it when it wakes
        return
