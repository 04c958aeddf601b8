"""Ways to do the same work, timed in turn, ours first; nothing is timed before the results agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Comparison:
    """Ways of doing one piece of work, ours first.

    `work` is how many `unit`s a call does. `check` raises unless ours and the peers' results agree; no speed is
    reported before it has passed.
    """

    runs: dict[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], None]
    work: float
    unit: str


@dataclass(frozen=True)
class Benchmark:
    """A named comparison and the sizes it runs at: `sizes` for figures, `small` for a quick check."""

    name: str
    make: Callable[..., Comparison]
    sizes: list[dict[str, Any]]
    small: dict[str, Any] = field(default_factory=dict)


def measure(comparison: Comparison, repeats: int) -> dict[str, float]:
    """Median seconds a call of each run, timed in turn so that all see the same load of the machine.

    Raises:
        AssertionError: the runs' results don't agree.
    """
    comparison.check({name: run() for name, run in comparison.runs.items()})
    times: dict[str, list[float]] = {name: [] for name in comparison.runs}
    for _ in range(repeats):
        for name, run in comparison.runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(taken) for name, taken in times.items()}


def seconds(run: Callable[[], Any]) -> float:
    """How long one call takes, a GPU's part of it included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
