"""A storage double: one write of all fails, tears, or is the last that its process made."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faultkit import sabotage

MODES = ("full", "fail", "killed before", "killed after", "torn")


@dataclass
class Double:
    """What happens to one incarnation's writes: the one with number `at` (from 0) meets `mode`.

    A killed incarnation is one whose later writes do nothing: the disk can't tell the difference, and neither may
    those who come after.
    """

    at: int = -1
    mode: str = ""
    writes: int = 0
    dead: bool = False
    fired: str = ""
    where: list[str] = field(default_factory=list)

    def step(self, op: str, table: str, when: str, folder: Path | None, before: set[Path]) -> None:
        """As `sabotage.Steps`."""
        if self.dead:
            raise OSError(errno.EIO, "this process is dead")
        if table.startswith("incarnations"):
            # beats come by the clock: counting them would make every run another one
            return
        number = self.writes if when == "before" else self.writes - 1
        if when == "before":
            self.where.append(f"{op} {table.partition('-')[0]}")
            self.writes += 1
        if number == self.at and not self.fired and when == ("before" if self.mode in _BEFORE else "after"):
            self.fired = self.where[number]
            self._fire(folder, before)

    def _fire(self, folder: Path | None, before: set[Path]) -> None:
        if self.mode == "torn":
            sabotage.tear(folder, before)
        self.dead = self.mode not in ("full", "fail")
        code = errno.ENOSPC if self.mode == "full" else errno.EIO
        raise OSError(code, os.strerror(code), "the disk")


_BEFORE = ("full", "killed before")


class Doubles:
    """The double of each incarnation: a store belongs to the one that was present when it was first used."""

    def __init__(self) -> None:
        self.present = Double()

    def of(self, tables: Any) -> Double:
        double: Double = tables.__dict__.setdefault("_double", self.present)
        return double


@contextmanager
def doubles() -> Iterator[Doubles]:
    """Inside, every cold store of this process writes through a double."""
    made = Doubles()
    undo = sabotage.install(made.of)
    try:
        yield made
    finally:
        undo()
