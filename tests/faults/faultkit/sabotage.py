"""Faults at exact places of a process under test: this module wraps, in that process alone, what writes to the store.

A process looks into its folder of plans before and after every write. A plan is a JSON file: {"do", "when", "op",
"table", "skip", "seconds"}. It fires once, in the first process that renames the file.

    do      kill       SIGKILL this process
            stop       SIGSTOP it; whoever made the plan continues it
            full       the disk is full (ENOSPC), nothing was written
            fail       the write was made, and its success is reported as an error
            slow       the write takes `seconds` longer
            tear       the files that the write left are cut in half, and the process is killed: a power loss before
                       the sync
    when    before, after
    op      create, add, fence, sync, update, merge, delete, compact, clean, drop, any
    table   the beginning of the table's name: journal, log, catalog, snapshots; "" for any
    skip    how often the place is passed before it fires
"""

import errno
import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

WRITES = {"add": "add", "update": "update", "delete": "delete", "optimize": "compact"}
DATASET_WRITES = {"compact_files": "compact", "cleanup_old_versions": "clean"}


class Plans:
    """The folder of plans, as the process under test sees it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._passed: dict[str, int] = {}
        self.steps = 0

    def step(self, op: str, table: str, when: str, folder: Path | None, before: set[Path]) -> None:
        """One place at which a plan may fire."""
        self.steps += 1
        for file in sorted(self._folder.glob("*.json")):
            try:
                plan = json.loads(file.read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            if plan["when"] == when and plan["op"] in (op, "any") and table.startswith(plan["table"]):
                passed = self._passed[file.name] = self._passed.get(file.name, -1) + 1
                if passed >= plan["skip"] and self._taken(file, f"{op} {table} {when}"):
                    self._fire(plan, folder, before)

    def _taken(self, file: Path, where: str) -> bool:
        fired = file.with_suffix(".fired")
        try:
            file.rename(file.with_suffix(".taken"))
        except FileNotFoundError:
            return False
        fired.with_suffix(".writing").write_text(json.dumps({"pid": os.getpid(), "where": where}))
        fired.with_suffix(".writing").rename(fired)
        return True

    def _fire(self, plan: dict[str, Any], folder: Path | None, before: set[Path]) -> None:
        match plan["do"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "slow":
                time.sleep(plan["seconds"])
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
            case "fail":
                raise OSError(errno.EIO, os.strerror(errno.EIO), "the disk")
            case "tear":
                tear(folder, before)
                os.kill(os.getpid(), signal.SIGKILL)


class Steps(Protocol):
    """Who hears of every write of a cold store, and may raise."""

    def step(self, op: str, table: str, when: str, folder: Path | None, before: set[Path]) -> None:
        """A place before or after a write; `before` are the files that the table had."""


class _Write:
    """Both places of one write: before and after it."""

    def __init__(self, plans: Steps, op: str, table: str, folder: Path | None) -> None:
        self._plans, self._op, self._table, self._folder = plans, op, table, folder
        self._before: set[Path] = set()

    def __enter__(self) -> None:
        self._before = _files(self._folder)
        self._plans.step(self._op, self._table, "before", self._folder, self._before)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._plans.step(self._op, self._table, "after", self._folder, self._before)


class _Table:
    """A LanceDB table whose writes can be hit."""

    def __init__(self, real: Any, hit: Callable[[str], _Write]) -> None:
        self._real, self._hit = real, hit

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name in WRITES:
            return _wrapped(value, self._hit, WRITES[name])
        if name == "merge_insert":
            return lambda *args: _Merge(value(*args), self._hit)
        if name == "to_lance":
            return lambda: _Dataset(value(), self._hit)
        return value

    def __len__(self) -> int:
        return len(self._real)


class _Merge:
    def __init__(self, real: Any, hit: Callable[[str], _Write]) -> None:
        self._real, self._hit = real, hit

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name == "execute":
            return _wrapped(value, self._hit, "merge")
        return lambda *args, **kwargs: _Merge(value(*args, **kwargs), self._hit)


class _Dataset:
    def __init__(self, real: Any, hit: Callable[[str], _Write]) -> None:
        self._real, self._hit = real, hit

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name == "optimize":
            return _Dataset(value, self._hit)
        if name == "merge_insert":
            return lambda *args: _Merge(value(*args), self._hit)
        if name == "commit":
            commit = _wrapped(value, self._hit, "fence")
            return lambda base, *args, **kwargs: commit(base._real, *args, **kwargs)
        return _wrapped(value, self._hit, DATASET_WRITES[name]) if name in DATASET_WRITES else value


def _wrapped(function: Any, hit: Callable[[str], _Write], op: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with hit(op):
            return function(*args, **kwargs)

    return call


def install(steps_of: Callable[[Any], Steps], tables_class: Any = None) -> Callable[[], None]:
    """Wrap this process's tables; return what takes the wrapping away.

    Args:
        steps_of: who hears of the writes of a `Tables`.
        tables_class: raymem's `Tables`, while its module is still being imported.
    """
    wrapped = tables_class or importlib.import_module("raymem.storage.tables.tables").Tables
    init, folder_sync = wrapped.__init__, wrapped.folder_sync

    def hit(tables: Any, name: str) -> Callable[[str], _Write]:
        place = None if "://" in tables.uri else Path(tables.uri) / f"{name}.lance"
        return lambda op: _Write(steps_of(tables), op, name, place)

    def make(self: Any, *args: Any) -> None:
        init(self, *args)
        self._connection = _Connection(self._connection, lambda name: hit(self, name))

    def make_sync(self: Any, name: str) -> Any:
        real = folder_sync(self, name)
        return real if real is None else _Sync(real, hit(self, name))

    wrapped.__init__, wrapped.folder_sync = make, make_sync

    def undo() -> None:
        wrapped.__init__, wrapped.folder_sync = init, folder_sync

    return undo


class _Connection:
    """A LanceDB connection whose writes can be hit."""

    def __init__(self, real: Any, hit: Callable[[str], Callable[[str], _Write]]) -> None:
        self._real, self._hit = real, hit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def open_table(self, name: str) -> "_Table":
        return _Table(self._real.open_table(name), self._hit(name))

    def create_table(self, name: str, *args: Any, **kwargs: Any) -> "_Table":
        with self._hit(name)("create"):
            made = self._real.create_table(name, *args, **kwargs)
        return _Table(made, self._hit(name))

    def drop_table(self, name: str, **kwargs: Any) -> None:
        with self._hit(name)("drop"):
            self._real.drop_table(name, **kwargs)


class _Sync:
    def __init__(self, real: Any, hit: Callable[[str], _Write]) -> None:
        self._real, self._hit = real, hit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def sync(self) -> None:
        with self._hit("sync"):
            self._real.sync()


def tear(folder: Path | None, before: set[Path]) -> None:
    """Cut the files that a write added in half."""
    for path in _files(folder) - before:
        os.truncate(path, path.stat().st_size // 2)


def _files(folder: Path | None) -> set[Path]:
    return set() if folder is None else {path for path in folder.rglob("*") if path.is_file()}
