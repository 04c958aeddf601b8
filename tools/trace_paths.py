"""Count the files and functions of raymem that one write, one read and one attach enter, in process.

    python tools/trace_paths.py                  the counts
    python tools/trace_paths.py --list           and every function, in the order of the files
    python tools/trace_paths.py --json FILE      and the counts in FILE, as one line

Each path is one call of the blocking store, traced with sys.setprofile from the call until it returns:

    write    one row, durable, to a hot bank
    read     one query of a hot bank that has applied all its rows
    attach   a bank that this store has detached before

A path runs several times. A function counts if each run entered it, on any thread. Heartbeats, which some runs meet,
stay out, as does what the first run alone does: imports, answers that are kept from then on, and in a read the rows
that earlier writes left to be applied. These are counted apart; --list marks them with the number of their runs.

A coroutine that waited and is resumed counts like one that is entered. A comprehension is part of the function that it
stands in. Methods that dataclasses make have no source in raymem and are not counted. A thread that Rust or C++ starts
is not traced.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import raymem
from raymem.bench.fixture import Fixture

PACKAGE = Path(raymem.__file__).resolve().parent
RUNS = 4
_INLINE = {"<module>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
Function = tuple[str, str]


class Tracer:
    """Notes the functions of raymem that are entered, on every thread started after it was made."""

    def __init__(self) -> None:
        self._seen: set[CodeType] | None = None
        threading.setprofile(self._enter)
        sys.setprofile(self._enter)

    def run(self, call: Callable[[], Any]) -> set[Function]:
        """The functions entered while `call` runs, as (file, qualified name)."""
        seen: set[CodeType] = set()
        self._seen = seen
        try:
            call()
        finally:
            self._seen = None
        return {function for code in list(seen) if (function := _name(code)) is not None}

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        # another thread may end the run between a look and the next
        seen = self._seen
        if event == "call" and seen is not None:
            seen.add(frame.f_code)


def _name(code: CodeType) -> Function | None:
    path = Path(code.co_filename).resolve()
    rooms = [PACKAGE, *((PACKAGE / room).resolve() for room in raymem.ROOMS)]
    if code.co_name in _INLINE or not any(path.is_relative_to(room) for room in rooms):
        return None
    return str(path.relative_to(PACKAGE.parent)), f"{code.co_qualname}:{code.co_firstlineno}"


def trace() -> dict[str, list[set[Function]]]:
    """What each run of each path enters, in a store of its own."""
    tracer = Tracer()
    with tempfile.TemporaryDirectory(prefix="raymem-trace-") as folder:
        fixture = Fixture(Path(folder))
        with raymem.connect(Path(folder) / "cold") as store:
            store.put_calibration(fixture.calibration)
            bank = store.create("trace/paths", fixture.spec())
            bank.write(fixture.trace(64))
            states = fixture.trace(1).hidden
            traces = iter([fixture.trace(1, seq=64 + run) for run in range(RUNS)])
            paths: dict[str, Callable[[], Any]] = {
                "write": lambda: bank.write(next(traces)),
                "read": lambda: bank.read(states, k=4),
                "attach": bank.attach,
            }
            found: dict[str, list[set[Function]]] = {name: [] for name in paths}
            for name, call in paths.items():
                for _ in range(RUNS):
                    if name == "attach":
                        bank.detach()
                    found[name].append(tracer.run(call))
    return found


def count(runs: list[set[Function]]) -> dict[str, int]:
    """How many files and functions every run of a path enters."""
    entered = set.intersection(*runs)
    return {"files": len({file for file, _ in entered}), "functions": len(entered)}


def listing(runs: list[set[Function]]) -> list[str]:
    """A line for each function that a path enters, with a mark at those that not every run enters."""
    times = Counter(function for run in runs for function in run)
    marks = {name: "" if entered == len(runs) else f"~{entered}/{len(runs)} " for name, entered in times.items()}
    return [f"  {mark}{file} {function}" for (file, function), mark in sorted(marks.items())]


def main() -> None:
    """Print the counts, and write them as one line of JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to FILE, as one line")
    parser.add_argument("--list", action="store_true", help="name every function")
    arguments = parser.parse_args()
    found = trace()
    counts = {name: count(runs) for name, runs in found.items()}
    for name, runs in found.items():
        more = len(set.union(*runs)) - counts[name]["functions"]
        print(
            f"{name}: {counts[name]['files']} files, {counts[name]['functions']} functions ({more} more in some runs)"
        )
        if arguments.list:
            print(*listing(runs), sep="\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
