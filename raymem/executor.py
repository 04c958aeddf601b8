"""The threads of a host as its event loop sees them, and locks by name."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, TypeVarTuple

from raymem.errors import StoreClosed

L = TypeVar("L")
T = TypeVar("T")
Args = TypeVarTuple("Args")


class Executor:
    """A thread pool for what takes longer than the hop there and back, about 100 µs.

    Args:
        pool: the threads; without any, functions run where they are called.
    """

    def __init__(self, pool: ThreadPoolExecutor | None = None) -> None:
        self._pool = pool

    async def run(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """Run a function in a thread.

        Raises:
            StoreClosed: there are no threads any more.
        """
        if self._pool is None:
            return function(*args)
        try:
            done = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        except RuntimeError as error:
            raise StoreClosed(f"this store is closed, or its process ends ({error}); connect again") from error
        return await done


def run_now(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that never waits: for callers without an event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise AssertionError("it waits for something")


def resolve(done: asyncio.Future[Any], outcome: Any) -> None:
    """Give a future its result or its error, unless its caller was cancelled."""
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


class Locks(Generic[L]):
    """One lock for each key, kept only while a caller holds or awaits it: keys come from callers and never end.

    Args:
        make: makes one.
    """

    def __init__(self, make: Callable[[], L]) -> None:
        self._make = make
        self._locks: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def __getitem__(self, key: Hashable) -> L:
        lock: L = self._locks.setdefault(key, self._make())
        return lock

    def __len__(self) -> int:
        return len(self._locks)
