"""A process that owns banks, told what to do by JSON lines on stdin: the smallest thing that can be killed.

Every owner is a machine of its own as far as the others can tell, so that it takes a bank over once the lease of the
one before has run out: also of one that is merely stopped and will wake. With a lease of 0 it doesn't wait for that, as
if its clock were wrong: the fence alone must keep the two apart.
"""

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from faultkit import made, mutations, sabotage
from faultkit.commands import Run, serve

from raymem import AsyncStore, Settings
from raymem.client import local
from raymem.config import ColdSettings, HostSettings
from raymem.storage.journal import journal, log

# soon enough that a short schedule meets it
journal._COMPACT_EVERY = log._COMPACT_EVERY = int(os.environ.get("FAULTS_COMPACT_EVERY", "12"))


class Owner:
    """Runs commands against a store of this process's own."""

    def __init__(self, store: AsyncStore) -> None:
        self._store = store

    async def run(self, method: str, bank: str, *args: Any) -> Any:
        """One command; its answer as JSON data."""
        handle = self._store.bank(bank)
        match method:
            case "create":
                await self._store.create(bank, made.spec(*args))
            case "write":
                ack = await handle.write(made.trace(*args))
                return [ack.rows, ack.duplicates]
            case "snapshot":
                return await self._store.backend.host.snapshot(bank)
            case "delete":
                await self._store.delete(bank)
            case "fork":
                await self._store.fork(bank, *args)
            case "merge":
                await self._store.merge(bank, *args, rebuild=True)
            case "erase":
                return (await handle.erase(stream=args[0], rebuild=True)).rows
            case _:
                answer = await getattr(handle, method)(*args)
                return answer if isinstance(answer, str | int) else "done"
        return "done"


async def main(uri: str, plans: str, mutation: str, lease: str) -> None:
    """Serve until stdin ends."""
    lease_s = float(lease)
    if lease_s:
        local.socket = SimpleNamespace(gethostname=lambda: f"machine-{os.getpid()}")
    else:
        local._runs = lambda known: False
    laid_out = sabotage.Plans(Path(plans))
    sabotage.install(lambda tables: laid_out)
    mutations.mutate(mutation)
    settings = Settings(cold=ColdSettings(snapshot_bytes=4096), host=HostSettings(lease_s=lease_s or 9.0))

    async def begin() -> Run:
        return Owner(await AsyncStore.connect(uri, settings=settings)).run

    await serve(begin)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
