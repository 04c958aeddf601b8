"""What the connector counts, and how vLLM's own metrics show it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Counters:
    """Since the engine started. When nothing is queued, `rows_seen == rows_written + rows_shed`.

    `rows_seen` are the rows of opted-in requests; `traces_shed` the requests cut short, for the reasons that
    `shed_by_code` counts; `rows_kept` the rows of those that had been written before, a gapless beginning.
    """

    rows_seen: int = 0
    rows_written: int = 0
    rows_shed: int = 0
    rows_kept: int = 0
    traces_shed: int = 0
    requests_refused: int = 0
    writes: int = 0
    write_seconds: float = 0.0
    bytes_written: int = 0
    retries: int = 0
    queue_bytes: int = 0
    queue_bytes_max: int = 0
    shed_by_code: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as plain data."""
        return asdict(self)


# what goes to vLLM's log line and to Prometheus: the counters that only grow
SHOWN = {
    "rows_written": "Hidden-state rows written to banks.",
    "rows_shed": "Hidden-state rows that were not written.",
    "traces_shed": "Requests whose stream was cut short.",
    "requests_refused": "Requests whose wish to stream could not be followed.",
    "retries": "Writes to banks that were tried again.",
}


def growth(now: Counters, before: Counters) -> dict[str, Any]:
    """Return what the shown counters gained, without those that stood still."""
    gained = {f.name: getattr(now, f.name) - getattr(before, f.name) for f in fields(Counters) if f.name in SHOWN}
    return {name: value for name, value in gained.items() if value}
