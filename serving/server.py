"""The gateway under uvicorn, on this machine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from raymem.config import Settings
from raymem.errors import ConfigError
from raymem.serving.app import create_app
from raymem.serving.door import check_bind
from raymem.store import AsyncStore

Listening = Callable[[str, str], None]


def run(uri: str, cold: str | None, settings: Settings, on_listen: Listening | None = None) -> None:
    """Serve a store until interrupted, then settle its banks.

    Args:
        uri: the store, see `raymem.connect`.
        cold: with Ray.
        settings: `gateway` says where to listen and who may come.
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
    # opened here, so that what fails is told as it is; closed by the app, before signals end the process
    store = await AsyncStore.connect(uri, cold=cold, settings=settings)

    async def opener() -> AsyncStore:
        return store

    config = uvicorn.Config(create_app(opener, settings), log_level="warning", timeout_graceful_shutdown=30)
    server = _Server(config, lambda: on_listen(address(listener), uri) if on_listen else None)
    await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_listen: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listen = on_listen

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listen()


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
    except OSError as error:
        listener.close()
        raise ConfigError(f"can't listen on {host}:{port}: {error}; choose another with --host and --port") from error
    return listener


def address(listener: socket.socket) -> str:
    """The http:// address of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
