"""What a command prints: results on stdout, as tables or one JSON document; everything else on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from raymem import logs
from raymem.errors import RaymemError, StorageError

Report = Callable[[int, int], None]
_wants_json = False


def reset() -> None:
    """Set the defaults: tables, and warnings on stderr."""
    global _wants_json
    _wants_json = False
    set_log_level(logging.WARNING)


def set_log_level(level: int) -> None:
    """Log on stderr from this level on."""
    logs.on_stderr(level)


def set_json(wanted: bool) -> bool:
    """The `--json` option's callback: answer in JSON, errors too."""
    global _wants_json
    _wants_json = wanted
    return wanted


def show(data: Any, render: Callable[[Any], Any] | None = None) -> None:
    """Print a result: `data` as JSON where that was asked for, else what `render` returns."""
    if _wants_json:
        print(to_json(data))
    else:
        Console().print(render(data) if render else data)


def give(figures: Any, table: Table, file: Path | None) -> None:
    """Print a table, and write its figures to a file; for `-` print the figures alone."""
    if str(file) != "-":
        Console().print(table)
    if file is not None:
        write_json(figures, file)


def write_json(data: Any, file: Path) -> None:
    """Write figures to a file, or to stdout for `-`.

    Raises:
        StorageError: the file can't be written.
    """
    if str(file) == "-":
        print(to_json(data))
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_json(data) + "\n")
    except OSError as error:
        raise StorageError(f"can't write {file}: {error}") from error


def to_json(data: Any) -> str:
    """Models, dataclasses and plain data as indented JSON."""
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(data), indent=2, ensure_ascii=False)


def say(text: str) -> None:
    """A line for people, on stderr."""
    Console(stderr=True).print(text)


def fail(error: RaymemError) -> None:
    """One red line on stderr; with `--json` also the error as the document on stdout."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"error: {error.message}", style="red", markup=False, highlight=False)
    if _wants_json:
        print(to_json({"error": error.to_wire()}))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table; numbers are aligned right."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][number], int | float)
        made.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        made.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return made


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A progress bar on stderr; the block gets a function to call with done and total."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr while the block runs."""
    with Console(stderr=True).status(what):
        yield


def size(count: int) -> str:
    """Bytes for people."""
    for power, unit in enumerate(("B", "KB", "MB", "GB")):
        if count < 1024 ** (power + 1):
            return f"{count / 1024**power:.{min(power, 1)}f} {unit}"
    return f"{count / 1024**4:.1f} TB"
