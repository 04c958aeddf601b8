"""Count the files and functions of raymem that one write, one read and one attach enter, in process.

    python tools/trace_paths.py [--json FILE] [--list]

Each path is a call of the blocking store on a hot bank: a durable write of one row, a read of one query, an attach of a
detached bank. It runs several times and what every run entered counts, so that heartbeats beside it do not.
Comprehensions count as part of the function that they stand in.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
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
        self._seen = seen = set()
        call()
        self._seen = None
        return {function for code in list(seen) if (function := _name(code)) is not None}

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self._seen is not None:
            self._seen.add(frame.f_code)


def _name(code: CodeType) -> Function | None:
    path = Path(code.co_filename).resolve()
    rooms = [PACKAGE, *((PACKAGE / room).resolve() for room in raymem.ROOMS)]
    if code.co_name in _INLINE or not any(path.is_relative_to(room) for room in rooms):
        return None
    return str(path.relative_to(PACKAGE.parent)), f"{code.co_qualname}:{code.co_firstlineno}"


def trace() -> dict[str, set[Function]]:
    """What each path enters, in a store of its own."""
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
            found = {}
            for name, call in paths.items():
                runs = []
                for _ in range(RUNS):
                    if name == "attach":
                        bank.detach()
                    runs.append(tracer.run(call))
                found[name] = set.intersection(*runs)
    return found


def counts(found: dict[str, set[Function]]) -> dict[str, dict[str, int]]:
    """How many files and functions each path enters."""
    return {
        name: {"files": len({file for file, _ in entered}), "functions": len(entered)}
        for name, entered in found.items()
    }


def main() -> None:
    """Print the counts, and write them as one line of JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to FILE, as one line")
    parser.add_argument("--list", action="store_true", help="name every function")
    arguments = parser.parse_args()
    found = trace()
    for name, count in counts(found).items():
        print(f"{name}: {count['files']} files, {count['functions']} functions")
        if arguments.list:
            print(*(f"  {file} {function}" for file, function in sorted(found[name])), sep="\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(counts(found)) + "\n")


if __name__ == "__main__":
    main()
