"""Limits of untrusted connections: what each may send, how long it may take, and how many there may be."""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from raymem.config import GatewaySettings
from raymem.errors import InvalidInput, Overloaded, RaymemError, TooLarge
from raymem.serving.errors import HEAD_TOO_LARGE, NOT_HTTP, TOO_SLOW, encode

_HEAD_BYTES = 2**16
_HEADERS = 128
# requests that one connection sends ahead of its answers
_PIPELINED = 4
# bytes of framing for each byte of a body: a chunk of one byte has six
_FRAMING = 16
# so much of a refused body is still read and dropped, so that the caller gets the answer
_DROP_BYTES = 64 * 2**20
# bytes come in bursts: bytes that came early count, for at most so many times the wait
_CREDIT = 3


@dataclass
class Limits:
    """What connections may do; see `GatewaySettings`."""

    connections: int
    wait_s: float
    min_rate: int

    @classmethod
    def of(cls, settings: GatewaySettings, descriptors: int) -> Limits:
        """The settings' limits, in a process of so many file descriptors; half of them are the store's."""
        return cls(min(settings.max_connections, max(8, descriptors // 2)), settings.wait_s, settings.min_rate)


class BoundedConfig(uvicorn.Config):
    """uvicorn's configuration for `BoundedProtocol`."""

    def __init__(self, app: Any, limits: Limits, **options: Any) -> None:
        # no route speaks WebSocket, and an upgrade would bypass the protocol's limits
        super().__init__(app, http=BoundedProtocol, ws="none", log_level="warning", access_log=False, **options)
        self.limits = limits


class _Phase(enum.Enum):
    """Where a connection is in a request."""

    HEAD = "waits for a request's head"
    BODY = "waits for its body"
    WORK = "has the whole request"


class BoundedProtocol(HttpToolsProtocol):
    """HTTP from callers that may be slow, many or hostile; `watch` calls `look` regularly."""

    def __init__(
        self,
        config: BoundedConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._phase = _Phase.HEAD
        # when bytes last came, and for how many seconds the gateway has waited in this phase
        self._news = self.loop.time()
        self._waited = 0.0
        # bytes of the request: the last piece, all, and those of its body
        self._piece = 0
        self._fed = 0
        self._got = 0
        # those of its body at the last look
        self._counted = 0
        # of the answer: bytes that the caller has not taken yet, and for how many seconds the gateway has waited
        self._unsent = 0
        self._stalled = 0.0

    @property
    def idle_since(self) -> float | None:
        """Since when the gateway has waited for the caller; None while it works on a request."""
        return None if self._phase is _Phase.WORK and self._is_busy() else self._news

    @property
    def address(self) -> str:
        """The caller's machine."""
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, and drop others when there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            _make_room([it for it in self.connections if isinstance(it, BoundedProtocol)], self._limits.connections)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, within limits."""
        self._unset_keepalive_if_required()
        self._news = self.loop.time()
        self._piece = len(data)
        self._fed += self._piece
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # the request is answered as if it had not asked for an upgrade
            self.cycle.keep_alive = False
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            told = cause if isinstance(cause, TooLarge) else InvalidInput("what came is no HTTP request")
            self.refuse(told, HEAD_TOO_LARGE if isinstance(cause, TooLarge) else NOT_HTTP)
            return
        overhead = self._fed - _FRAMING * self._got
        if self._phase is not _Phase.WORK and overhead > _HEAD_BYTES + self._piece * bool(self._got):
            self.refuse(_large_head(), HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._enter(_Phase.HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        if len(self.headers) >= _HEADERS:
            raise _large_head()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start work on a request whose head is there."""
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _HEAD_BYTES:
            raise _large_head()
        if len(self.pipeline) >= _PIPELINED:
            raise InvalidInput(f"more than {_PIPELINED} requests wait for an answer here")
        super().on_headers_complete()
        self._enter(_Phase.BODY)

    def on_body(self, body: bytes) -> None:
        """Take a chunk of the body, or drop it when the request has been answered."""
        self._got += len(body)
        if self.cycle.response_complete and self._got > _DROP_BYTES:
            self.transport.abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        super().on_message_complete()
        self._enter(_Phase.WORK)

    def on_response_complete(self) -> None:
        """The answer is sent; the next request may begin."""
        self._news = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        """The caller took most of what there was."""
        self._stalled = min(0.0, self._stalled)
        super().resume_writing()

    def look(self, seconds: float) -> None:
        """Refuse or drop a caller that keeps the gateway waiting, `seconds` after the last look."""
        came, self._counted = self._got - self._counted, self._got
        if self._phase is not _Phase.WORK and not self.flow.read_paused:
            self._waited = self._late(self._waited, seconds, came)
            if self._waited > self._limits.wait_s:
                text = (
                    f"the request did not arrive within {self._limits.wait_s:g} s, nor at {self._limits.min_rate} B/s"
                )
                self.refuse(InvalidInput(f"{text}: send it faster"), TOO_SLOW)
        unsent = self.transport.get_write_buffer_size()
        taken, self._unsent = max(0, self._unsent - unsent), unsent
        self._stalled = self._late(self._stalled, seconds, taken) if unsent else 0.0
        if self._stalled > self._limits.wait_s:
            self.drop()

    def _late(self, late: float, seconds: float, nbytes: int) -> float:
        """How long a caller has kept the gateway waiting, `seconds` and `nbytes` later."""
        return max(-_CREDIT * self._limits.wait_s, late + seconds - nbytes / self._limits.min_rate)

    def shutdown(self) -> None:
        """Finish a complete request; drop one whose body is still coming."""
        if self._phase is _Phase.BODY and not self.flow.read_paused:
            self.drop()
        else:
            self._stalled = max(0.0, self._stalled)
            super().shutdown()

    def refuse(self, error: RaymemError, status: int) -> None:
        """Answer in place of the app if no answer has begun, and close."""
        started = self.cycle is not None and self._phase is not _Phase.HEAD and self.cycle.response_started
        if started or (self._phase is _Phase.HEAD and (self._is_busy() or not self._fed)):
            self.drop()
            return
        body = encode({"error": error.to_wire()})
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self._forget()
        self.transport.close()

    def drop(self) -> None:
        """Close at once, without sending the rest."""
        self._forget()
        self.connections.discard(self)
        self.transport.abort()

    def _forget(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # tells the app that the caller is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _enter(self, phase: _Phase) -> None:
        if phase is _Phase.HEAD:
            # it begins within the bytes that are being parsed
            self._fed, self._got, self._counted = self._piece, 0, 0
        self._phase, self._waited = phase, 0.0


def _make_room(there: list[BoundedProtocol], most: int) -> None:
    """Drop the connections that have kept the gateway waiting for longest, first of the machine with the most.

    It drops a sixteenth at once, so that not every new connection has to scan all others.
    """
    crowds = Counter(it.address for it in there)
    waiting = [(-crowds[it.address], since, it) for it in there if (since := it.idle_since) is not None]
    waiting.sort(key=lambda found: found[:2])
    for _, _, it in waiting[: len(there) - most + most // 16]:
        it.drop()
    left = [it for it in there if it in it.connections]
    for it in left[most:]:
        it.refuse(Overloaded("the gateway has too many connections; come back later", retry_after_s=1.0), 503)


def _large_head() -> TooLarge:
    return TooLarge(f"the address and headers have more than {_HEAD_BYTES} bytes or {_HEADERS} lines; send less")


async def watch(connections: Iterable[Any], every_s: float = 0.5) -> None:
    """Check all connections every `every_s` seconds, until cancelled."""
    loop = asyncio.get_running_loop()
    before = loop.time()
    while True:
        await asyncio.sleep(every_s)
        now = loop.time()
        # a pause of the loop itself is not counted against callers
        elapsed, before = min(now - before, 2 * every_s), now
        for connection in list(connections):
            if isinstance(connection, BoundedProtocol):
                connection.look(elapsed)
