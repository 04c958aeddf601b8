"""A connector for tests: writes to banks of the namespace `stuck` wait for as long as a file named `gate` is there."""

import asyncio
import os
from pathlib import Path

from raymem.serving.vllm.connector import RaymemConnector


class GatedSink:
    def __init__(self, inner, gate: Path):
        self._inner = inner
        self._gate = gate

    async def write(self, bank, trace):
        while bank.startswith("stuck/") and self._gate.exists():
            await asyncio.sleep(0.02)
        await self._inner.write(bank, trace)

    async def close(self):
        await self._inner.close()


class GatedConnector(RaymemConnector):
    def open_sink(self):
        return GatedSink(super().open_sink(), Path(os.environ["STUCK_BANKS_GATE"]))
