"""The connector's counters in vLLM's log line and on its Prometheus page."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from raymem.serving.vllm.counters import SHOWN


class RaymemStats(KVConnectorStats):
    """Gains of the shown counters over one interval."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, gain in other.data.items():
            self.data[name] = self.data.get(name, 0) + gain
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"raymem_{name}": value for name, value in self.data.items()}


class RaymemPromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter for each of `SHOWN`, per engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        make = self._counter_cls
        families = {
            name: make(name=f"vllm:raymem_{name}", documentation=text, labelnames=self._labelnames)
            for name, text in SHOWN.items()
        }
        self._counters: dict[tuple[int, str], Counter] = {
            (engine, name): family.labels(*labels)
            for name, family in families.items()
            for engine, labels in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, gain in transfer_stats_data.items():
            self._counters[engine_idx, name].inc(gain)
