"""The threads of a host, as its event loop sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from raymem.errors import StoreClosed

T = TypeVar("T")


class Executor:
    """A thread pool for what takes longer than the hop there and back, about 100 µs."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function in a thread.

        Raises:
            StoreClosed: there are no threads any more.
        """
        try:
            done = asyncio.get_running_loop().run_in_executor(self._pool, function)
        except RuntimeError as error:
            raise StoreClosed(f"this store is closed, or its process ends ({error}); connect again") from error
        return await done


def settle(done: asyncio.Future[Any], outcome: Any) -> None:
    """Give what waits its result or its error, unless whoever waited went away."""
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
