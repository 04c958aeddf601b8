"""The gateway under uvicorn, on this machine."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from raymem.client.store import AsyncStore
from raymem.config import Settings
from raymem.errors import ConfigError
from raymem.logs import RateLimit
from raymem.serving.app import create_app
from raymem.serving.auth import check_bind
from raymem.serving.connections import BoundedConfig, Limits, watch

Listening = Callable[[str, str], None]
# at shutdown: seconds for requests to finish, and for a caller to take its answer
_GRACE_S = 10
_LAST_WAIT_S = 2.0
# callers can make these speak: the server, its sockets, the gateway's own errors
_LOGGERS = ("uvicorn.error", "asyncio", "raymem.gateway")
_DESCRIPTORS = 2**16
_QUEUE = 2048


def run(uri: str, cold: str | None, settings: Settings, on_listen: Listening | None = None) -> None:
    """Serve a store until interrupted, then flush its banks.

    Args:
        uri: the store, see `raymem.connect`.
        cold: with Ray.
        settings: `gateway` has the address and the keys.
        on_listen: called with the gateway's address and the store, once requests are answered.

    Raises:
        ConfigError: the address can't be had, or would be open to other machines without keys.
    """
    check_bind(settings.gateway)
    listener = bind(settings.gateway.host, settings.gateway.port)
    asyncio.run(_serve(uri, cold, settings, listener, on_listen))


async def _serve(
    uri: str, cold: str | None, settings: Settings, listener: socket.socket, on_listen: Listening | None
) -> None:
    # opened here, so that its errors are raised as they are; the app closes it, before signals end the process
    store = await AsyncStore.connect(uri, cold=cold, settings=settings)

    async def opener() -> AsyncStore:
        return store

    def started() -> None:
        if on_listen:
            on_listen(address(listener), uri)

    await make_server(create_app(opener, settings), settings, started).serve([listener])


def make_server(app: FastAPI, settings: Settings, on_start: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """A server for an app of `create_app` that callers can't keep waiting; `on_start` is called once it answers."""
    for logger in map(logging.getLogger, _LOGGERS):
        if not any(isinstance(found, RateLimit) for found in logger.filters):
            logger.addFilter(RateLimit())
    descriptors = _raise_descriptors()
    limits = Limits.of(settings.gateway, descriptors)
    # connections that asyncio accepts before it serves the first of them
    backlog = max(16, min(128, descriptors // 16))
    config = BoundedConfig(app, limits, timeout_graceful_shutdown=_GRACE_S, backlog=backlog)
    return _Server(config, limits, on_start)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, limits: Limits, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._limits = limits
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._watch = asyncio.create_task(watch(self.server_state.connections))
        await super().startup(sockets)
        for listener in sockets or []:
            # asyncio accepts `backlog` at once; a longer queue keeps callers from waiting a second for a retry
            listener.listen(_QUEUE)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._limits.wait_s = min(self._limits.wait_s, _LAST_WAIT_S)
        try:
            await super().shutdown(sockets)
        finally:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch


def _raise_descriptors() -> int:
    """Raise this process's limit of open files as far as allowed, up to 65,536; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 takes any that is free.

    Raises:
        ConfigError: naming the address and what is wrong with it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches off Nagle's algorithm only where the protocol is named; with it each answer waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError, ValueError) as error:
        listener.close()
        raise ConfigError(f"can't listen on {host}:{port}: {error}; choose another with --host and --port") from error
    return listener


def address(listener: socket.socket) -> str:
    """The http:// address of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
