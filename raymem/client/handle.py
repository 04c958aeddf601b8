"""Where a store can be used: in the process and on the event loop that opened it, until it is closed.

A process that ends cleanly closes the stores that are still open. It does so while executors still take work, which
they don't by the time that `atexit` runs its functions.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import thread as pools
from typing import TYPE_CHECKING

from raymem.errors import RaymemError, StoreClosed
from raymem.logs import get_logger

if TYPE_CHECKING:
    from raymem.host.backend import Backend

log = get_logger("raymem.client.handle")
# a loop that the caller runs may be stuck
_CLOSE_S = 30.0
# a daemon thread that goes on while the interpreter ends is cut off wherever it is, and within C++ that is an abort
_PARK_S = 2.0


class Handle:
    """A backend, as far as it may be used here.

    Args:
        backend: opened by this process, on the event loop that runs now.
    """

    def __init__(self, backend: Backend) -> None:
        self.pid = os.getpid()
        self.loop = _running()
        self.closed = False
        self._backend = backend
        _ends.handles.add(self)

    @property
    def backend(self) -> Backend:
        """The backend.

        Raises:
            StoreClosed: not from here, or not any more.
        """
        require(self.pid)
        if self.closed:
            raise StoreClosed("this store is closed; connect again")
        here = _running()
        if self.loop is None:
            self.loop = here
        elif here not in (None, self.loop):
            state = "closed" if self.loop.is_closed() else "another one"
            raise StoreClosed(
                f"this store was opened on an event loop that is {state}; an AsyncStore belongs to its loop: connect "
                "again on this one, or use raymem.connect(), whose store works from any thread and loop"
            )
        return self._backend

    def keep(self) -> None:
        """Rows were accepted that are not durable yet: they are written when the process ends, at the latest."""
        _ends.kept.add(self)

    async def close(self) -> None:
        """Close the backend, once; in a forked child nothing happens.

        Raises:
            StorageError: rows that had been accepted could not be written.
        """
        if self.closed or self.pid != os.getpid():
            return
        self.closed = True
        _ends.kept.discard(self)
        if self.loop in (None, _running()):
            await self._backend.close()
        elif self.loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._backend.close(), self.loop))
        else:
            await asyncio.to_thread(self._backend.abandon)

    def end(self) -> None:
        """`close` as the process ends, from a thread without a loop."""
        if self.loop is not None and self.loop.is_running():
            asyncio.run_coroutine_threadsafe(self.close(), self.loop).result(_CLOSE_S)
        elif not self.closed:
            self.closed = True
            self._backend.abandon()


class _Ends:
    """What the end of the process has to see to; after a fork, also what is the parent's."""

    def __init__(self) -> None:
        # the process that has come so far
        self.ending: int | None = None
        self.handles: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.kept: set[Handle] = set()
        # how a blocking store is closed, and whose it is
        self.stores: dict[Callable[[], None], int] = {}
        self.users: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


_ends = _Ends()


def require(pid: int) -> None:
    """Raise StoreClosed unless this process is `pid`, and goes on."""
    here = os.getpid()
    if here != pid:
        raise StoreClosed(
            f"this store was opened in process {pid}, and this is {here}, a fork of it, which has none of its threads: "
            "connect again here, or start processes with multiprocessing's 'spawn'"
        )
    if _ends.ending == here:
        if threading.current_thread().daemon:
            threading.Event().wait(_PARK_S)
        raise StoreClosed(f"process {here} is ending, and its stores are closed; join threads that write before that")


def at_end(close: Callable[[], None]) -> Callable[[], None]:
    """Have a blocking store closed when the process ends; call what is returned once it was."""
    _ends.stores[close] = os.getpid()

    def done() -> None:
        _ends.stores.pop(close, None)

    return done


def using() -> None:
    """This thread uses a store: the process's end waits for it, as it does anyway unless it is a daemon."""
    thread = threading.current_thread()
    if not thread.daemon and thread is not threading.main_thread():
        _ends.users.add(thread)


def _end() -> None:
    here = os.getpid()
    try:
        # an executor's threads end later than this
        for thread in set(_ends.users) - set(pools._threads_queues):
            thread.join()
    finally:
        _ends.ending = here
        closing = [close for close, pid in list(_ends.stores.items()) if pid == here]
        for close in closing + [_ending(each) for each in list(_ends.handles) if each.pid == here]:
            try:
                close()
            except (RaymemError, TimeoutError, OSError) as error:
                log.error("store not closed as the process ended", error=str(error))


def _ending(handle: Handle) -> Callable[[], None]:
    return handle.end


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


try:
    # the last registered runs first: before the one by which executors stop
    threading._register_atexit(_end)  # type: ignore[attr-defined]
except RuntimeError:
    # imported by a thread that goes on after the main one: too late to open a store
    _ends.ending = os.getpid()
