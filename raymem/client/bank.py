"""A bank's verbs, async and blocking, and the handle that they work through.

A handle works in the process and on the event loop that opened it, until it is closed. A process that ends cleanly
closes the stores that are still open. It does so while executors still take work, which they don't by the time that
`atexit` runs its functions.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
import types
import typing
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from concurrent.futures import thread as pools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypeAlias, TypeVar, cast

import torch
from pydantic import BeforeValidator
from torch import Tensor

from raymem.errors import InvalidTrace, RaymemError, StoreClosed
from raymem.inputs import (
    AnyAsOf,
    AnyMoment,
    AttendedCount,
    Check,
    Count,
    Flag,
    Label,
    Lifetime,
    Neighbours,
    Partitions,
    Place,
    TargetPath,
    named,
    numbers,
    shown,
)
from raymem.logs import get_logger
from raymem.rows import AttendedRows, Trace
from raymem.types import (
    DTYPES,
    Ack,
    AttendedExtent,
    AttendQuery,
    BankInfo,
    ChoiceMethod,
    EraseReceipt,
    MemoryTokens,
    MigrationReport,
    Readout,
    RebalanceReport,
    RestoreReport,
    Selection,
)

if TYPE_CHECKING:
    from raymem.client.http import HttpBackend
    from raymem.partition.backend import PartitionedBackend

    # both have every verb of a store; names are checked before they come there
    Backend: TypeAlias = HttpBackend | PartitionedBackend

A = TypeVar("A")
T = TypeVar("T")
P = ParamSpec("P")

log = get_logger("raymem.client.bank")
# a loop that the caller runs may be stuck
_CLOSE_S = 30.0
# a daemon thread that goes on while the interpreter ends is cut off wherever it is, and within C++ that is an abort
_PARK_S = 2.0
_CLOSED = "this store is closed; connect again"


class Handle:
    """A backend that one process and one event loop may use.

    Args:
        backend: opened by this process, on the event loop that runs now.
    """

    def __init__(self, backend: Backend) -> None:
        self.pid = os.getpid()
        self.loop = asyncio._get_running_loop()
        self.closed = False
        self._backend = backend
        _at_end.handles.add(self)

    @property
    def backend(self) -> Backend:
        """The backend.

        Raises:
            StoreClosed: another process or event loop asks, or the store was closed.
        """
        if self.pid != os.getpid() or self.pid == _at_end.ending:
            raise _unusable(self.pid)
        if self.closed:
            raise StoreClosed(_CLOSED)
        here = asyncio._get_running_loop()
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
        """Note that it accepted rows which are not durable yet: the end of the process writes them at the latest."""
        _at_end.kept.add(self)

    async def close(self) -> None:
        """Close the backend, once; in a forked child nothing happens.

        Raises:
            StorageError: rows that had been accepted could not be written.
        """
        if self.closed or self.pid != os.getpid():
            return
        self.closed = True
        _at_end.kept.discard(self)
        if self.loop in (None, asyncio._get_running_loop()):
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


class LoopThread:
    """An event loop on a thread of its own, for blocking callers in any thread of this process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._closed = False
        # held while a call is submitted: one that came after the last would never be answered
        self._submitting = threading.Lock()
        self._last: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="raymem-store", daemon=True)
        self._thread.start()
        _at_end.loops[self] = self._pid

    def close_with(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Set what runs before the loop ends."""
        self._last = last

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for what a coroutine returns.

        Raises:
            StoreClosed: the loop has ended, also while this waited; or this is a forked child.
        """
        try:
            if self._pid != os.getpid() or self._pid == _at_end.ending:
                raise _unusable(self._pid)
            thread = threading.current_thread()
            # the end of the process waits for such a thread, as the interpreter does anyway unless it is a daemon
            if not thread.daemon and thread is not threading.main_thread():
                _at_end.users.add(thread)
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
                asyncio.run_coroutine_threadsafe(self._last(), self._loop).result()
        finally:
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            _at_end.loops.pop(self, None)

    async def _finish(self) -> None:
        """Cancel the calls that still wait, and end the threads."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_default_executor()


class _AtEnd:
    """What the end of the process has to close or wait for; after a fork, also what is the parent's."""

    def __init__(self) -> None:
        # the process that has come so far
        self.ending: int | None = None
        self.handles: weakref.WeakSet[Handle] = weakref.WeakSet()
        # those with rows that are not durable yet
        self.kept: set[Handle] = set()
        # the loops of blocking stores, and the process of each
        self.loops: dict[LoopThread, int] = {}
        self.users: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def run(self) -> None:
        """Wait for the threads that use a store, then close all that this process opened."""
        here = os.getpid()
        try:
            # an executor's threads end later than this
            for thread in set(self.users) - set(pools._threads_queues):
                thread.join()
        finally:
            self.ending = here
            closing = [loop.close for loop, pid in list(self.loops.items()) if pid == here]
            for close in closing + [handle.end for handle in list(self.handles) if handle.pid == here]:
                try:
                    close()
                except (RaymemError, TimeoutError, OSError) as error:
                    log.error("store not closed as the process ended", error=str(error))


_at_end = _AtEnd()
try:
    # the last registered runs first: before the one by which executors stop
    threading._register_atexit(_at_end.run)  # type: ignore[attr-defined]
except RuntimeError:
    # imported by a thread that goes on after the main one: too late to open a store
    _at_end.ending = os.getpid()


def _unusable(pid: int) -> StoreClosed:
    """Why a store of process `pid` can't be used: this is a fork of it, or it is ending, where daemon threads wait."""
    here = os.getpid()
    if here != pid:
        return StoreClosed(
            f"this store was opened in process {pid}, and this is {here}, a fork of it, which has none of its threads: "
            "connect again here, or start processes with multiprocessing's 'spawn'"
        )
    if threading.current_thread().daemon:
        threading.Event().wait(_PARK_S)
    return StoreClosed(f"process {here} is ending, and its stores are closed; join threads that write before that")


def checked(cls: type[A]) -> type[A]:
    """A class whose public async verbs check their arguments against the domains that their signatures name, first.

    Each raises InvalidInput, or the class that the domain says, naming the argument, the value and the fix.
    """
    for name, verb in list(vars(cls).items()):
        if inspect.iscoroutinefunction(verb) and not name.startswith("_"):
            setattr(cls, name, _checked(verb))
    return cls


def domains(verb: Callable[..., Any]) -> dict[str, Check | None]:
    """A verb's arguments and the check of each, None where its signature names no domain."""
    hints = typing.get_type_hints(verb, include_extras=True)
    return {name: _check_of(hints[name]) for name in inspect.signature(verb).parameters if name != "self"}


def _checked(verb: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(verb)
    # once it is called: the classes that a signature names may come after it
    checks = functools.cache(lambda: [(name, check) for name, check in domains(verb).items() if check is not None])

    @functools.wraps(verb)
    async def checked_verb(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            # this says so in Python's own words, with the verb's name
            return await verb(*args, **kwargs)
        for name, check in checks():
            if name in bound.arguments:
                bound.arguments[name] = named(name, check, bound.arguments[name])
        return await verb(*bound.args, **bound.kwargs)

    return checked_verb


def _check_of(hint: Any) -> Check | None:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        check = _check_of(inner[0])
        return None if check is None else lambda value: None if value is None else check(value)
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, BeforeValidator):
            return cast(Check, part.func)
    return None


@checked
class AsyncBank:
    """A handle on one bank."""

    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self.name = name

    async def info(self) -> BankInfo:
        """The bank's entry in the catalog, with its size if it is hot."""
        return await self._handle.backend.info(self.name)

    async def write(self, trace: Trace, *, durable: Flag = True) -> Ack:
        """Write a trace; it is durable when this returns, unless `durable=False`.

        Raises:
            InvalidTrace, NonFinite, SequenceConflict, BankDetached, Overloaded, StorageError: nothing was written.
        """
        if not isinstance(trace, Trace):
            raise InvalidTrace(f"trace is {shown(trace)}; give a raymem.Trace")
        given = trace.checked(torch.float32 if isinstance(trace.hidden, Tensor) else await self._dtype())
        if not durable:
            self._handle.keep()
        return await self._handle.backend.write(self.name, given, durable)

    async def read(
        self,
        queries: Tensor,
        k: Neighbours = 32,
        *,
        start: Count = 1,
        as_of: AnyAsOf = None,
        allow_partial: Flag = False,
    ) -> Readout:
        """Read with Q consecutive hidden states [Q, L, D] of one context.

        Args:
            queries: in the fingerprint's layers and dtype.
            k: neighbours or candidates a query.
            start: position of the first in its context; the state at position 0 is an attention sink and finds nothing.
            as_of: read what the bank was at a tag or a time: seconds since 1970, a datetime or ISO 8601. At a time it
                had all rows before the first that was stamped later.
            allow_partial: take an answer without those partitions that don't give theirs in time, `Readout.missing`.
        """
        asked = numbers("queries", queries, await self._dtype_of(queries))
        return await self._handle.backend.read(
            self.name, asked, k, start, cast(str | float | None, as_of), allow_partial
        )

    async def attend(
        self,
        queries: Tensor | None,
        tokens: Tensor | None = None,
        rows: AttendedCount = 512,
        *,
        layer: Count | None = None,
        method: ChoiceMethod = "fused",
        as_of: AnyAsOf = None,
        fetch: Flag = True,
    ) -> MemoryTokens:
        """Choose the rows that a model is to attend to while it goes on from a text.

        Keys and values come with them where the bank keeps those of all (`put_rows`). Where it doesn't, rebuild them
        from the runs' tokens: `raymem.lm.rebuilding`.

        Args:
            queries: hidden states [Q, L, D] of the text's last tokens, as in `read`; None to choose by tokens alone.
            tokens: their ids [Q].
            rows: how many; fewer come where fewer are held.
            layer: whose states are compared, one of the bank's; the middle one by default.
            method: "fused" sums what states and BM25 over token ids say; "states", "bm25", "even" or "recent" alone.
            as_of: as in `read`.
            fetch: whether to fetch keys and values.

        Raises:
            InvalidInput: another layer, or nothing to choose by. InvalidTrace, NonFinite: states that don't fit.
            Unsupported: the bank's kind holds no rows.
        """
        dtype = torch.float32 if queries is None else await self._dtype_of(queries)
        query = AttendQuery(queries, tokens, rows, layer, method, fetch).checked(dtype)
        return await self._handle.backend.attend(self.name, query, cast(str | float | None, as_of))

    async def put_rows(self, rows: AttendedRows, *, int8: Flag = True) -> AttendedExtent:
        """Keep keys and values of rows that were written, for a model to attend to; durable when this returns.

        Rows whose keys and values are kept already get these instead.

        Args:
            rows: of one run.
            int8: round floats to int8 with a scale a head; otherwise to bfloat16. A bank keeps one of the two.

        Raises:
            InvalidInput: a row that was not written. InvalidTrace, NonFinite: tensors that can't be these.
            FingerprintMismatch: other layers, heads, width, RoPE or dtype than the bank's, naming them.
            TooLarge: more than `cold.attended_bytes`. In each case nothing was kept.
        """
        if not isinstance(rows, AttendedRows):
            raise InvalidTrace(f"rows are {shown(rows)}; give raymem.AttendedRows")
        return await self._handle.backend.put_rows(self.name, rows.checked(int8=int8))

    async def attach(self, node: Label | None = None) -> BankInfo:
        """Load the bank from the cold store, on `node` if one is named."""
        return await self._handle.backend.attach(self.name, node)

    async def detach(self) -> BankInfo:
        """Flush the bank, write its state to the cold store, free its memory."""
        return await self._handle.backend.detach(self.name)

    async def migrate(self, to: Label, *, partition: Count | None = None) -> MigrationReport:
        """Move the bank to another node while it is read, or one of its partitions."""
        return await self._handle.backend.migrate(self.name, to, partition)

    async def grow(self, partitions: Partitions) -> BankInfo:
        """Add empty partitions, until there are so many; no stream moves, and new ones go where there are fewest."""
        return await self._handle.backend.grow(self.name, partitions)

    async def rebalance(self) -> RebalanceReport:
        """Move streams to the partitions where they would go now, while they are read and written.

        Each one's writes wait while it is handed over. What was cut short is finished by the next call.

        Raises:
            Conflict: the bank has tags or forks. Unsupported: the bank is not partitioned.
        """
        return await self._handle.backend.rebalance(self.name)

    async def pin(self) -> BankInfo:
        """Keep the bank in memory when its shard needs room; others go first anyway if they were used longer ago."""
        return await self._handle.backend.pin(self.name, True)

    async def unpin(self) -> BankInfo:
        """Let the bank leave memory when its shard needs room; it comes back at its next use."""
        return await self._handle.backend.pin(self.name, False)

    async def tag(self, tag: Label) -> dict[str, int]:
        """Name the present position; return all tags."""
        return await self._handle.backend.tag(self.name, tag)

    async def tags(self) -> dict[str, int]:
        """All tags and their positions."""
        return (await self.info()).tags

    async def untag(self, tag: Label) -> dict[str, int]:
        """Forget a tag; return those that are left.

        Raises:
            TagNotFound: naming the tags there are.
        """
        return await self._handle.backend.untag(self.name, tag)

    async def restore(self, at: Place) -> RestoreReport:
        """Go back to a tag or a position.

        Nothing is lost: what came after stays in a bank of its own, which the report names, and this one becomes its
        fork. Writers are held off meanwhile.

        Raises:
            TagNotFound, InvalidInput: there is no such tag or position; nothing was changed.
        """
        return await self._handle.backend.restore(self.name, at)

    async def materialise(self) -> BankInfo:
        """Copy what this fork inherited into its own journal, so that it needs its parent no more."""
        return await self._handle.backend.materialise(self.name)

    async def digest(self) -> str:
        """sha256 of the bank's whole state; equal digests mean byte-identical states."""
        return await self._handle.backend.digest(self.name)

    async def tokens(self, stream: Label, run: Label, seq_from: Count, seq_to: Count) -> Tensor:
        """Token ids [T] int64 of a run's rows in [seq_from, seq_to), in order; absent ones are left out.

        Works on a detached bank too.
        """
        return await self._handle.backend.tokens(self.name, stream, run, seq_from, seq_to)

    async def export(self, path: TargetPath) -> int:
        """Write the bank to one file; return its bytes."""
        return await self._handle.backend.export(self.name, Path(path))

    async def erase(
        self,
        *,
        stream: Label | None = None,
        run: Label | None = None,
        seq_from: Count | None = None,
        seq_to: Count | None = None,
        before: AnyMoment | None = None,
        scope: Literal["rows", "run"] = "rows",
        rebuild: Flag = False,
    ) -> EraseReceipt:
        """Erase the rows for which all that is given holds, for good: a stream, a run, a few rows, what is old.

        Args:
            stream: whose rows.
            run: only this run's.
            seq_from: only rows of the run from this one on.
            seq_to: and before this one.
            before: only rows of traces older than this, in seconds since the epoch.
            scope: "run", also later rows of the same runs, whose states have traces of these; the receipt counts them.
            rebuild: go on for kinds that can't take rows out of their state: it is replayed from the rows that stay.

        Raises:
            Unsupported: such a kind, without `rebuild`; nothing was changed. InvalidInput: nothing selected.
        """
        what = Selection(stream, run, seq_from, seq_to, cast(float | None, before), scope)
        return await self._handle.backend.erase(self.name, what.check(), rebuild)

    async def receipts(self, *, forget_names: Flag = False) -> list[EraseReceipt]:
        """The receipts of erasures here, oldest first; `forget_names` leaves digests of names in finished ones."""
        return await self._handle.backend.receipts(self.name, forget_names)

    async def set_ttl(self, ttl_s: Lifetime) -> BankInfo:
        """Let rows expire that are older than `ttl_s` seconds, or none; the owner erases them in batches."""
        return await self._handle.backend.set_ttl(self.name, ttl_s)

    async def _dtype_of(self, states: object) -> torch.dtype:
        return torch.float32 if isinstance(states, Tensor) else await self._dtype()

    async def _dtype(self) -> torch.dtype:
        # what arrays and lists are cast to; a tensor is taken in its own or refused
        return DTYPES[(await self.info()).spec.fingerprint.dtype]


class Blocking(Generic[A]):
    """An async store or bank, and the loop that its verbs run on."""

    def __init__(self, inner: A, loop: LoopThread) -> None:
        self._async = inner
        self._loop = loop


def blocking(verb: Callable[Concatenate[A, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """An async verb as a blocking one, with its arguments, documentation and errors."""

    @functools.wraps(verb)
    def call(self: Blocking[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(verb(self._async, *args, **kwargs))

    call.__qualname__ = verb.__qualname__.removeprefix("Async")
    return call


class Bank(Blocking[AsyncBank]):
    """A handle on one bank whose verbs block; each is the verb of AsyncBank."""

    def __init__(self, bank: AsyncBank, loop: LoopThread) -> None:
        super().__init__(bank, loop)
        self.name = bank.name

    info = blocking(AsyncBank.info)
    write = blocking(AsyncBank.write)
    read = blocking(AsyncBank.read)
    attend = blocking(AsyncBank.attend)
    put_rows = blocking(AsyncBank.put_rows)
    attach = blocking(AsyncBank.attach)
    detach = blocking(AsyncBank.detach)
    migrate = blocking(AsyncBank.migrate)
    grow = blocking(AsyncBank.grow)
    rebalance = blocking(AsyncBank.rebalance)
    pin = blocking(AsyncBank.pin)
    unpin = blocking(AsyncBank.unpin)
    tag = blocking(AsyncBank.tag)
    tags = blocking(AsyncBank.tags)
    untag = blocking(AsyncBank.untag)
    restore = blocking(AsyncBank.restore)
    materialise = blocking(AsyncBank.materialise)
    digest = blocking(AsyncBank.digest)
    tokens = blocking(AsyncBank.tokens)
    export = blocking(AsyncBank.export)
    erase = blocking(AsyncBank.erase)
    receipts = blocking(AsyncBank.receipts)
    set_ttl = blocking(AsyncBank.set_ttl)
