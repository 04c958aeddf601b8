"""From the engine's worker to the banks, on a thread of its own and through a queue bounded in bytes.

The engine's thread only ever holds a lock for a few instructions. When there is no room, or the store refuses, the
run is shed whole from there on: a bank then holds a gapless beginning of it, and what is missing has been counted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raymem.errors import RaymemError, Unavailable
from raymem.logs import get_logger
from raymem.retry import retrying
from raymem.serving.vllm.counters import Counters
from raymem.serving.vllm.once import Once
from raymem.serving.vllm.params import ConnectorConfig
from raymem.serving.vllm.tracker import Piece
from raymem.types import Trace

log = get_logger("raymem.vllm")
_LONGEST_PAUSE_S = 1.0


class Sink(Protocol):
    """Where traces go: banks by name."""

    async def write(self, bank: str, trace: Trace) -> None:
        """Return when the trace is durable, or raise a RaymemError."""

    async def close(self) -> None:
        """Release what was opened."""


@dataclass(frozen=True)
class Chunk:
    """A piece and its rows `hidden_TLD` in host memory, which may be read once `ready()` has returned."""

    piece: Piece
    hidden_TLD: Tensor
    ready: Callable[[], None]
    time: float


@dataclass
class _Run:
    queued: int = 0
    written: int = 0
    shed: bool = False
    ended: bool = False


class Sender:
    """Takes chunks without ever waiting; writes them in order per run, neighbours of a run as one trace."""

    def __init__(self, open_sink: Callable[[], Sink], config: ConnectorConfig) -> None:
        self._open_sink = open_sink
        self._config = config
        self._sink: Sink | None = None
        self._count = Counters()
        self._once = Once()
        self._runs: dict[str, _Run] = {}
        self._queues: dict[str, deque[Chunk]] = {}
        self._tasks: dict[str, concurrent.futures.Future[None]] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stop = asyncio.Event()
        started = threading.Event()
        work = self._serve(started)
        self._thread = threading.Thread(target=lambda: asyncio.run(work), name="raymem-sender", daemon=True)
        self._thread.start()
        started.wait()

    def reserve(self, piece: Piece, nbytes: int) -> bool:
        """Claim room for a piece's rows; False when its run is shed, now or before."""
        rows = len(piece.tokens)
        with self._lock:
            run = self._runs.setdefault(piece.run, _Run())
            self._count.rows_seen += rows
            if run.shed or self._count.queue_bytes + nbytes > self._config.queue_bytes:
                self._shed(piece.run, rows, "queue_full")
                return False
            run.queued += 1
            self._count.queue_bytes += nbytes
            self._count.queue_bytes_max = max(self._count.queue_bytes_max, self._count.queue_bytes)
            return True

    def put(self, chunks: Iterable[Chunk]) -> None:
        """Queue chunks for which room was reserved."""
        with self._lock:
            for chunk in chunks:
                bank = chunk.piece.bank
                self._queues.setdefault(bank, deque()).append(chunk)
                if bank not in self._tasks:
                    self._tasks[bank] = asyncio.run_coroutine_threadsafe(self._drain(bank), self._loop)

    def end(self, runs: Iterable[str]) -> None:
        """Take note that these runs bring no more pieces, so that nothing need be remembered of them."""
        with self._lock:
            for name in runs:
                if run := self._runs.get(name):
                    run.ended = True
                    self._forget(name, run)

    def refuse(self, request: str, reason: RaymemError) -> None:
        """Count a request whose wish to stream can't be followed."""
        self._once.warn((reason.code, str(reason)), "request does not stream", request=request, reason=str(reason))
        with self._lock:
            self._count.requests_refused += 1

    def stats(self) -> Counters:
        """Return a copy of the counters."""
        with self._lock:
            return deepcopy(self._count)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued; False when the time was up first."""
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
                    self._shed(chunk.piece.run, len(chunk.piece.tokens), "shutdown")
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

    def _forget(self, name: str, run: _Run) -> None:
        if run.ended and not run.queued:
            del self._runs[name]

    async def _drain(self, bank: str) -> None:
        """Write a bank's queue until it is empty, then end."""
        while chunks := await self._next(bank):
            runs: dict[str, list[Chunk]] = {}
            for chunk in chunks:
                runs.setdefault(chunk.piece.run, []).append(chunk)
            await asyncio.gather(*(self._deliver(bank, name, parts) for name, parts in runs.items()))

    async def _next(self, bank: str) -> list[Chunk]:
        """Wait for company, then take the next batch off a bank's queue; an empty one ends the bank's task."""
        await asyncio.sleep(self._config.linger_s)
        taken: list[Chunk] = []
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

    async def _deliver(self, bank: str, name: str, parts: list[Chunk]) -> None:
        rows = sum(len(part.piece.tokens) for part in parts)
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

    async def _attempt(self, bank: str, run: str, parts: list[Chunk]) -> str | None:
        """Write one run's parts as one trace; return why it failed, None when it is durable."""
        try:
            await self._write(bank, _trace(parts))
        except RaymemError as error:
            log.error("write refused", bank=bank, run=run, code=error.code, reason=str(error))
            return error.code
        except Exception:  # the engine must outlive whatever a store's client raises
            log.exception("write failed", bank=bank, run=run)
            return "failed"
        return None

    async def _write(self, bank: str, trace: Trace) -> None:
        started = time.perf_counter()
        await retrying(
            lambda: self._write_once(bank, trace),
            Unavailable,
            self._config.retry_s,
            longest_s=_LONGEST_PAUSE_S,
            before_pause=self._count_retry,
        )
        with self._lock:
            self._count.writes += 1
            self._count.bytes_written += trace.nbytes
            self._count.write_seconds += time.perf_counter() - started

    async def _write_once(self, bank: str, trace: Trace) -> None:
        if self._sink is None:
            self._sink = self._open_sink()
        await self._sink.write(bank, trace)

    def _count_retry(self) -> None:
        with self._lock:
            self._count.retries += 1


def _trace(parts: list[Chunk]) -> Trace:
    for part in parts:
        part.ready()
    first = parts[0].piece
    tokens = [token for part in parts for token in part.piece.tokens]
    return Trace(
        hidden=torch.cat([part.hidden_TLD for part in parts]),
        tokens=torch.tensor(tokens, dtype=torch.int64),
        stream=first.stream,
        run=first.run,
        seq=first.seq,
        time=parts[0].time,
    )
