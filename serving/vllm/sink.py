"""The sink that writes to the banks of a raymem store, checking each bank once against the engine's fingerprint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from raymem.client.store import AsyncBank, AsyncStore
from raymem.rows import Trace
from raymem.serving.vllm.params import ConnectorConfig
from raymem.types import Fingerprint

# the least recently used handle is dropped; the next write makes it again
_MOST_BANKS = 1024


class StoreSink:
    """Writes traces to the banks of one store; a bank that is slow to open delays only its own rows.

    Args:
        config: names the store.
        require: gets a bank's fingerprint before the first write to it; raises to refuse it.
        made_by: returns the engine's fingerprint, which each write carries; called after `require`.
    """

    def __init__(
        self, config: ConnectorConfig, require: Callable[[Fingerprint], None], made_by: Callable[[], Fingerprint]
    ) -> None:
        self._config = config
        self._require = require
        self._made_by = made_by
        self._connecting = asyncio.Lock()
        self._store: AsyncStore | None = None
        self._banks: dict[str, asyncio.Task[AsyncBank]] = {}

    async def write(self, bank: str, trace: Trace) -> None:
        """Write a trace; it is durable when this returns.

        Raises:
            FingerprintMismatch: the bank belongs to another model, other layers or another dtype.
            BankNotFound, BankDetached, Unavailable, InvalidTrace: as the store says.
        """
        handle = await self._bank(bank)
        await handle.write(replace(trace, fingerprint=self._made_by()))

    async def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            await self._store.close()

    async def _bank(self, name: str) -> AsyncBank:
        # the most recently used comes last
        opening = self._banks.pop(name, None) or asyncio.create_task(self._open(name))
        self._banks[name] = opening
        if len(self._banks) > _MOST_BANKS:
            del self._banks[next(iter(self._banks))]
        # all writes that wait for a failed opening get its error; the next write opens again
        try:
            return await asyncio.shield(opening)
        finally:
            if opening.done() and (opening.cancelled() or opening.exception()) and self._banks.get(name) is opening:
                del self._banks[name]

    async def _open(self, name: str) -> AsyncBank:
        async with self._connecting:
            if self._store is None:
                self._store = await AsyncStore.connect(self._config.store, cold=self._config.cold)
        handle = self._store.bank(name)
        info = await handle.info()
        await asyncio.to_thread(self._require, info.spec.fingerprint)
        return handle
