"""Sends rows from the engine's worker to the banks, on a thread of its own, through a queue bounded in bytes.

The engine's thread holds a lock for a few instructions only. When the queue is full, or the store refuses rows, the
sender sheds the rest of that run: the bank holds a gapless beginning of it, and the counters hold what is missing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tenacity import stop_after_delay
from torch import Tensor

from raymem.errors import RaymemError, Unavailable
from raymem.logs import WarnOnce, get_logger
from raymem.retry import retrying
from raymem.rows import Trace
from raymem.serving.vllm.params import ConnectorConfig
from raymem.serving.vllm.tracker import RunSlice

log = get_logger("raymem.vllm")
_LONGEST_PAUSE_S = 1.0


class Sink(Protocol):
    """Where traces go: banks by name."""

    async def write(self, bank: str, trace: Trace) -> None:
        """Return when the trace is durable, or raise a RaymemError."""

    async def close(self) -> None:
        """Release what was opened."""


@dataclass
class StreamCounters:
    """What was streamed since the engine started. With an empty queue, `rows_seen == rows_written + rows_shed`.

    `rows_seen` are the rows of opted-in requests. `traces_shed` counts requests whose rest was shed, and
    `shed_by_code` why; `rows_kept` are their rows that had been written before.
    """

    rows_seen: int = 0
    rows_written: int = 0
    rows_shed: int = 0
    rows_kept: int = 0
    traces_shed: int = 0
    requests_refused: int = 0
    writes: int = 0
    write_seconds: float = 0.0
    bytes_written: int = 0
    retries: int = 0
    queue_bytes: int = 0
    queue_bytes_max: int = 0
    shed_by_code: dict[str, int] = field(default_factory=dict)


class RowCopier:
    """Copies rows of a paged cache `[blocks, layers, block_size, width]`, on a side stream where there are streams.

    The rows are gathered on the engine's own stream, so the next step may reuse the cache's blocks; only the copy to
    pinned memory runs beside it.
    """

    def __init__(self, cache: Tensor) -> None:
        self._cache = cache
        # torch's own stubs leave streams and events untyped
        cuda: Any = torch.cuda
        self._side = cuda.Stream(cache.device) if cache.is_cuda else None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: all layers of one token."""
        return self._cache.shape[1] * self._cache.shape[3] * self._cache.element_size()

    def copy(self, slots: Sequence[int]) -> tuple[Tensor, Callable[[], None]]:
        """Start copying the rows at `slots` (block * block_size + offset).

        Returns:
            The rows `[T, L, D]` in host memory, and what to call before reading them.
        """
        slots_T = torch.tensor(slots, dtype=torch.int64)
        if self._cache.is_cuda:
            slots_T = slots_T.pin_memory().to(self._cache.device, non_blocking=True)
        size = self._cache.shape[2]
        rows_TLD = self._cache[slots_T // size, :, slots_T % size]
        if self._side is None:
            return rows_TLD, lambda: None
        return self._copy_aside(rows_TLD, self._side)

    @staticmethod
    def _copy_aside(rows_TLD: Tensor, side: Any) -> tuple[Tensor, Callable[[], None]]:
        host_TLD = torch.empty_like(rows_TLD, device="cpu", pin_memory=True)
        side.wait_stream(torch.cuda.current_stream(rows_TLD.device))
        with torch.cuda.stream(side):
            host_TLD.copy_(rows_TLD, non_blocking=True)
        rows_TLD.record_stream(side)
        return host_TLD, side.record_event().synchronize


@dataclass(frozen=True)
class QueuedRows:
    """A slice of a run with its rows `hidden_TLD` in host memory, which may be read once `ready()` has returned."""

    source: RunSlice
    hidden_TLD: Tensor
    ready: Callable[[], None]
    time: float


@dataclass
class _RunState:
    queued: int = 0
    written: int = 0
    shed: bool = False
    ended: bool = False


class Sender:
    """Takes chunks without waiting; writes each run in order, consecutive chunks as one trace."""

    def __init__(self, open_sink: Callable[[], Sink], config: ConnectorConfig) -> None:
        self._open_sink = open_sink
        self._config = config
        self._sink: Sink | None = None
        self._count = StreamCounters()
        self._once = WarnOnce(log)
        self._runs: dict[str, _RunState] = {}
        self._queues: dict[str, deque[QueuedRows]] = {}
        self._tasks: dict[str, concurrent.futures.Future[None]] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stop = asyncio.Event()
        started = threading.Event()
        work = self._serve(started)
        self._thread = threading.Thread(target=lambda: asyncio.run(work), name="raymem-sender", daemon=True)
        self._thread.start()
        started.wait()

    def reserve(self, source: RunSlice, nbytes: int) -> bool:
        """Reserve room in the queue for a slice's rows; False when its run is shed, now or before."""
        rows = len(source.tokens)
        with self._lock:
            run = self._runs.setdefault(source.run, _RunState())
            self._count.rows_seen += rows
            if run.shed or self._count.queue_bytes + nbytes > self._config.queue_bytes:
                self._shed(source.run, rows, "queue_full")
                return False
            run.queued += 1
            self._count.queue_bytes += nbytes
            self._count.queue_bytes_max = max(self._count.queue_bytes_max, self._count.queue_bytes)
            return True

    def put(self, chunks: Iterable[QueuedRows]) -> None:
        """Queue chunks for which room was reserved."""
        with self._lock:
            for chunk in chunks:
                bank = chunk.source.bank
                self._queues.setdefault(bank, deque()).append(chunk)
                if bank not in self._tasks:
                    self._tasks[bank] = asyncio.run_coroutine_threadsafe(self._drain(bank), self._loop)

    def end(self, runs: Iterable[str]) -> None:
        """Note that these runs send no more rows, so that their state is dropped once it is written."""
        with self._lock:
            for name in runs:
                if run := self._runs.get(name):
                    run.ended = True
                    self._forget(name, run)

    def refuse(self, request: str, reason: RaymemError) -> None:
        """Count a request to stream that is refused."""
        self._once.warn((reason.code, str(reason)), "request does not stream", request=request, reason=str(reason))
        with self._lock:
            self._count.requests_refused += 1

    def stats(self) -> StreamCounters:
        """Return a copy of the counters."""
        with self._lock:
            return deepcopy(self._count)

    def flush(self, timeout_s: float) -> bool:
        """Wait until the queue is empty; False when that took longer."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._tasks, timeout_s)

    def close(self) -> None:
        """Write what is queued within the deadline, count the rest as shed, and stop the thread."""
        if not self.flush(self._config.flush_s):
            self._drop_queues()
        if self._sink is not None:
            closing = asyncio.run_coroutine_threadsafe(self._sink.close(), self._loop)
            concurrent.futures.wait([closing], self._config.flush_s)
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(self._config.flush_s)

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        started.set()
        await self._stop.wait()

    def _drop_queues(self) -> None:
        with self._lock:
            for queue in self._queues.values():
                for chunk in queue:
                    self._shed(chunk.source.run, len(chunk.source.tokens), "shutdown")
                queue.clear()
            unsure = self._count.rows_seen - self._count.rows_written - self._count.rows_shed
            log.error("shut down with rows unwritten", rows_shed=self._count.rows_shed, rows_in_flight=unsure)

    def _shed(self, name: str, rows: int, code: str) -> None:
        run = self._runs[name]
        self._count.rows_shed += rows
        if run.shed:
            return
        run.shed = True
        self._count.traces_shed += 1
        self._count.rows_kept += run.written
        self._count.shed_by_code[code] = self._count.shed_by_code.get(code, 0) + 1
        log.warning("trace shed", run=name, code=code, rows_kept=run.written)

    def _forget(self, name: str, run: _RunState) -> None:
        if run.ended and not run.queued:
            del self._runs[name]

    async def _drain(self, bank: str) -> None:
        """Write a bank's queue until it is empty, then end."""
        while chunks := await self._next(bank):
            runs: dict[str, list[QueuedRows]] = {}
            for chunk in chunks:
                runs.setdefault(chunk.source.run, []).append(chunk)
            await asyncio.gather(*(self._deliver(bank, name, parts) for name, parts in runs.items()))

    async def _next(self, bank: str) -> list[QueuedRows]:
        """Linger, then take the next batch off a bank's queue; an empty queue ends the bank's task."""
        await asyncio.sleep(self._config.linger_s)
        taken: list[QueuedRows] = []
        room = self._config.batch_bytes
        with self._idle:
            queue = self._queues[bank]
            while queue and room > 0:
                taken.append(queue.popleft())
                room -= taken[-1].hidden_TLD.nbytes
            if not taken:
                del self._tasks[bank], self._queues[bank]
                self._idle.notify_all()
        return taken

    async def _deliver(self, bank: str, name: str, parts: list[QueuedRows]) -> None:
        rows = sum(len(part.source.tokens) for part in parts)
        run = self._runs[name]
        code = "shed" if run.shed else await self._attempt(bank, name, parts)
        with self._lock:
            self._count.queue_bytes -= sum(part.hidden_TLD.nbytes for part in parts)
            if code is None:
                run.written += rows
                self._count.rows_written += rows
            else:
                self._shed(name, rows, code)
            run.queued -= len(parts)
            self._forget(name, run)

    async def _attempt(self, bank: str, run: str, parts: list[QueuedRows]) -> str | None:
        """Write one run's parts as one trace; return why it failed, None when it is durable."""
        try:
            await self._write(bank, _trace(parts))
        except RaymemError as error:
            log.error("write refused", bank=bank, run=run, code=error.code, reason=str(error))
            return error.code
        except Exception:  # no error of a store's client may end the engine
            log.exception("write failed", bank=bank, run=run)
            return "failed"
        return None

    async def _write(self, bank: str, trace: Trace) -> None:
        async def once() -> None:
            if self._sink is None:
                self._sink = self._open_sink()
            await self._sink.write(bank, trace)

        def count_retry() -> None:
            with self._lock:
                self._count.retries += 1

        started = time.perf_counter()
        await retrying(
            once,
            Unavailable,
            self._config.retry_s,
            longest_s=_LONGEST_PAUSE_S,
            before_pause=count_retry,
            # a store that asks for a longer pause than that is asked once more
            stop=stop_after_delay,
        )
        with self._lock:
            self._count.writes += 1
            self._count.bytes_written += trace.nbytes
            self._count.write_seconds += time.perf_counter() - started


def _trace(parts: list[QueuedRows]) -> Trace:
    for part in parts:
        part.ready()
    first = parts[0].source
    tokens = [token for part in parts for token in part.source.tokens]
    return Trace(
        hidden=torch.cat([part.hidden_TLD for part in parts]),
        tokens=torch.tensor(tokens, dtype=torch.int64),
        stream=first.stream,
        run=first.run,
        seq=first.seq,
        time=parts[0].time,
    )
