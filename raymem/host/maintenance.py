"""What an owner does unasked: erase rows that have lived their time, clear away what the catalog doesn't name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from raymem.config import ColdSettings
from raymem.errors import RaymemError
from raymem.logs import get_logger
from raymem.storage.erasure import erase as erasure
from raymem.storage.store import ColdStore
from raymem.storage.sweeper import sweep
from raymem.types import Selection

log = get_logger("raymem.host.maintenance")
Erase = Callable[[str, Selection], Awaitable[object]]


class Maintenance:
    """Looks after the banks of one host every `settings.expire_s` seconds, for all expired rows of a bank at once.

    Args:
        cold: the store.
        settings: how often, and how old what is swept has to be.
        names: the banks that are hot in the host now.
        erase: erases rows of one of them.
    """

    def __init__(self, cold: ColdStore, settings: ColdSettings, names: Callable[[], list[str]], erase: Erase) -> None:
        self._cold = cold
        self._settings = settings
        self._names = names
        self._erase = erase
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, if it has not begun; needs a running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="maintenance")

    def stop(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def once(self) -> int:
        """Erase what has expired, then sweep; return in how many banks rows went."""
        due = await asyncio.to_thread(self._due, time.time())
        for name, what in due:
            await self._erase(name, what)
        await asyncio.to_thread(sweep, self._cold, self._settings.sweep_age_s)
        return len(due)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.expire_s)
            try:
                await self.once()
            except RaymemError as error:
                # the next round tries again
                log.warning("maintenance cut short", error=str(error))

    def _due(self, now: float) -> list[tuple[str, Selection]]:
        mine = set(self._names())
        entries = [entry for entry in self._cold.catalog.list() if entry.name in mine]
        found = [(entry, self._expired(now - entry.ttl_s)) for entry in entries if entry.ttl_s is not None]
        return [(entry.name, what) for entry, what in found if erasure.is_due(self._cold, entry, what)]

    def _expired(self, before: float) -> Selection:
        return Selection(before=max(0.0, before), scope=self._settings.expire_scope)
