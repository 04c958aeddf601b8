"""The sink in use: banks of a raymem store, each checked once against what the engine computes."""

from __future__ import annotations

import asyncio
from typing import Any

from raymem.errors import ConfigError
from raymem.lm.models import content_hash, tokenizer_hash
from raymem.serving.vllm import insides
from raymem.serving.vllm.params import ConnectorConfig
from raymem.store import AsyncBank, AsyncStore
from raymem.types import DTYPES, Fingerprint, Trace


def engine_fingerprint(vllm_config: Any, layers: tuple[int, ...]) -> Fingerprint:
    """Say what made an engine's rows; calibration and values are left to each bank.

    Raises:
        ModelNotFound: the model's files are not on this machine.
        ConfigError: its hidden states are of a dtype that no bank holds.
    """
    folder = insides.model_folder(vllm_config)
    dtype: Any = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"the engine computes in {dtype}; banks hold {', '.join(DTYPES)}: set dtype= to one of those")
    return Fingerprint(
        model=str(vllm_config.model_config.model),
        content=content_hash(folder),
        layers=layers,
        width=int(vllm_config.model_config.get_hidden_size()),
        dtype=dtype,
        tokenizer=tokenizer_hash(folder),
    )


class StoreSink:
    """Writes traces to the banks of one store.

    Args:
        config: names the store.
        vllm_config: of the engine whose states are written.
        layers: those that the engine extracts.
    """

    def __init__(self, config: ConnectorConfig, vllm_config: Any, layers: tuple[int, ...]) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._layers = layers
        self._opening = asyncio.Lock()
        self._store: AsyncStore | None = None
        self._fingerprint: Fingerprint | None = None
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
        if self._fingerprint is None:
            self._fingerprint = await asyncio.to_thread(engine_fingerprint, self._vllm_config, self._layers)
        handle = self._store.bank(bank)
        theirs = (await handle.info()).spec.fingerprint
        # the name is a label, and calibration and value space are the bank's own choice: the rest must agree
        own = {"model": theirs.model, "calibration": theirs.calibration, "values": theirs.values}
        theirs.require(self._fingerprint.model_copy(update=own))
        self._banks[bank] = handle
        return handle
