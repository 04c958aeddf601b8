"""Many small jobs in few hops between the event loop and its threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]
# jobs of one hop: enough that the hop is cheap beside them, few enough that the first need not wait long for the last
_TOGETHER = 32


class Crew:
    """A thread pool that takes the small jobs of one turn of the event loop together.

    A hop to a thread and back costs about 100 µs, as much as a small write itself.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._jobs: list[_Job] = []

    async def run(self, function: Callable[[], T], *, small: bool = False) -> T:
        """Run a function in a thread; a small one together with others, whose result it then waits for too."""
        loop = asyncio.get_running_loop()
        if not small:
            return await loop.run_in_executor(self._pool, function)
        done: asyncio.Future[T] = loop.create_future()
        if not self._jobs:
            loop.call_soon(self._send, loop)
        self._jobs.append((function, done))
        return await done

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        jobs, self._jobs = self._jobs, []
        for start in range(0, len(jobs), _TOGETHER):
            self._pool.submit(_work, loop, jobs[start : start + _TOGETHER])


def _work(loop: asyncio.AbstractEventLoop, jobs: list[_Job]) -> None:
    outcomes = [_outcome(function) for function, _ in jobs]
    loop.call_soon_threadsafe(_hand_over, jobs, outcomes)


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
        return None, error


def _hand_over(jobs: list[_Job], outcomes: list[tuple[Any, Exception | None]]) -> None:
    for (_, done), (result, error) in zip(jobs, outcomes, strict=True):
        settle(done, error or result)


def settle(done: asyncio.Future[Any], outcome: Any) -> None:
    """Give what waits its result or its error, unless whoever waited went away."""
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
