"""The registry of durability figures, and what runs it.

A figure is a function of a `Fixture` in a module of its own; it measures LanceDB's or Ray's own way of doing the same
work in the same run, and says both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raymem.bench.fixture import Fixture, fixture
from raymem.errors import InvalidInput

# what the document of figures always has; a figure that was not asked for is null there
KEYS = (
    "journal_ratio",
    "many_banks_ratio",
    "attach_ratio",
    "migration_pause_ms",
    "migration_pause_ms_small",
    "migration_ratio",
    "fork_s",
    "fork_new_bytes",
    "recovery_s",
)
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """What a figure found: some of `KEYS`, and whatever else a reader needs to judge them, peers' figures first."""

    figures: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """One entry: a name, and the module and function that measure it, imported when asked for."""

    name: str
    module: str
    function: str = "measure"

    def measure(self, on: Fixture) -> Measured:
        """Measure it.

        Raises:
            ModuleNotFoundError: what it needs (Ray) is not installed.
        """
        function: Callable[[Fixture], Measured] = getattr(importlib.import_module(self.module), self.function)
        return function(on)


REGISTRY = (
    Figure("fork", "raymem.bench.history"),
    Figure("journal", "raymem.bench.journal", "journal"),
    Figure("many_banks", "raymem.bench.journal", "many_banks"),
    Figure("attach", "raymem.bench.journal", "attach"),
    Figure("migration", "raymem.bench.migration"),
    Figure("recovery", "raymem.bench.recovery"),
)


def run(
    only: Sequence[str] = (),
    *,
    folder: Path | None = None,
    sync: Literal["disk", "none"] = "disk",
    small: bool = False,
    repeats: int = 5,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Measure figures one after the other, each in a fresh folder.

    Args:
        only: names of the registry; all by default.
        folder: where the folders are made; where temporary files go by default.
        sync: the cold stores' mode, for ours and for the peers.
        small: tiny sizes, to see that everything runs.
        repeats: how often each way of doing the work is timed.
        report: called with the figures done and their number.

    Returns:
        Every key of `KEYS`, the sync mode, and `details` by the figure's name.

    Raises:
        InvalidInput: a name that is not in the registry.
    """
    known = [figure.name for figure in REGISTRY]
    if unknown := sorted(set(only) - set(known)):
        raise InvalidInput(f"no figure named {', '.join(unknown)}; there is {', '.join(known)}")
    chosen = [figure for figure in REGISTRY if not only or figure.name in only]
    document: dict[str, Any] = dict.fromkeys(KEYS)
    details = {}
    for done, figure in enumerate(chosen):
        report(done, len(chosen))
        with fixture(folder, sync, small=small, repeats=repeats) as on:
            found = figure.measure(on)
        document |= found.figures
        details[figure.name] = found.details
    report(len(chosen), len(chosen))
    return document | {"sync": sync, "details": details}
