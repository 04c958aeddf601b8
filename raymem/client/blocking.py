"""An event loop for callers that block."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, Self, TypeVar

from raymem.client.handle import at_end, require, using
from raymem.errors import StoreClosed

T = TypeVar("T")
_CLOSED = "this store is closed; connect again"


class Loop:
    """An event loop on a thread of its own, for blocking callers in any thread of this process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._closed = False
        # what comes after the last can't be submitted: no answer would ever come
        self._submitting = threading.Lock()
        self._last: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="raymem-store", daemon=True)
        self._thread.start()
        self._done = at_end(self.close)

    def close_with(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What to run before the loop ends."""
        self._last = last

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for what a coroutine returns.

        Raises:
            StoreClosed: the loop has ended, also while this waited; or this is a forked child.
        """
        try:
            require(self._pid)
            using()
            with self._submitting:
                if self._closed:
                    raise StoreClosed(_CLOSED)
                future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except StoreClosed:
            work.close()
            raise
        try:
            return future.result()
        except CancelledError as error:
            raise StoreClosed("this store was closed meanwhile; what was asked may have been done") from error

    def close(self) -> None:
        """End it, once; in a forked child nothing happens.

        Raises:
            What the last coroutine raises; the loop has ended all the same.
        """
        if self._pid != os.getpid():
            return
        with self._submitting:
            if self._closed:
                return
            self._closed = True
        try:
            if self._last is not None:
                self._submit(self._last()).result()
        finally:
            self._submit(self._finish()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._done()

    def _submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _finish(self) -> None:
        """Tell everyone who still waits, and end the threads."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_default_executor()


class Closes:
    """What has a loop of its own and closes it: a context manager."""

    _loop: Loop

    def close(self) -> None:
        """As `AsyncStore.close`; closing twice is fine."""
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
