"""The sink in use: banks of a raymem store, each checked once against what the engine computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raymem.serving.vllm.params import ConnectorConfig
from raymem.store import AsyncBank, AsyncStore
from raymem.types import Fingerprint, Trace


class StoreSink:
    """Writes traces to the banks of one store.

    Args:
        config: names the store.
        require: gets a bank's fingerprint before the first write to it; raises to refuse it.
    """

    def __init__(self, config: ConnectorConfig, require: Callable[[Fingerprint], None]) -> None:
        self._config = config
        self._require = require
        self._opening = asyncio.Lock()
        self._store: AsyncStore | None = None
        self._banks: dict[str, AsyncBank] = {}

    async def write(self, bank: str, trace: Trace) -> None:
        """Write a trace; it is durable when this returns.

        Raises:
            FingerprintMismatch: the bank belongs to another model, other layers or another dtype.
            BankNotFound, BankDetached, Unavailable, InvalidTrace: as the store says.
        """
        async with self._opening:
            handle = self._banks.get(bank) or await self._open(bank)
        await handle.write(trace)

    async def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            await self._store.close()

    async def _open(self, bank: str) -> AsyncBank:
        if self._store is None:
            self._store = await AsyncStore.connect(self._config.store, cold=self._config.cold)
        handle = self._store.bank(bank)
        info = await handle.info()
        await asyncio.to_thread(self._require, info.spec.fingerprint)
        self._banks[bank] = handle
        return handle
