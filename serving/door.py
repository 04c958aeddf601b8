"""The gateway's door: who may come in, and how much they may carry. Both are settled before a body is buffered."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymem import routes
from raymem.config import GatewaySettings
from raymem.errors import ConfigError, RaymemError, TooLarge, Unauthorized
from raymem.limits import caller
from raymem.serving.errors import respond

# probes know no key, and learn nothing but that the gateway lives
_OPEN = {routes.HEALTH.path, routes.READY.path, "/openapi.json", "/docs", "/redoc"}
# this much of a refused body is still read and thrown away, so that the client hears the answer before the end
_DRAIN_BYTES = 64 * 2**20


class BodyTooLarge(HTTPException):
    """A TooLarge on its way through code that only lets HTTP errors pass."""

    def __init__(self, error: TooLarge) -> None:
        super().__init__(error.http_status, error.message)
        self.error = error


class Door:
    """ASGI middleware: API keys, or loopback callers alone where there are none, and the limit on bodies."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._limit = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in _OPEN:
                caller.set(self._check_caller(scope, headers))
            self._check_size(int(headers.get("content-length", "0")))
        except RaymemError as error:
            await _drain(receive)
            await respond(error)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _check_caller(self, scope: Scope, headers: Headers) -> str:
        """Who asks, by a name that doesn't give the key away; callers of this machine that need none are one."""
        if not self._keys:
            _check_local(scope, headers)
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # headers are read as latin-1, whatever they hold; every key is compared, so that the time taken says nothing
        matches = [hmac.compare_digest(key, given.strip().encode("latin-1")) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized(
                "no API key, or one that is not known here; send `Authorization: Bearer KEY`, "
                "or connect with raymem.connect(url, api_key=…)"
            )
        return f"key {hashlib.sha256(given.strip().encode('latin-1')).hexdigest()[:16]}"

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise TooLarge(
                f"a body of {size} bytes is over the limit of {self._limit}; send it in pieces, "
                "or raise gateway.max_body_bytes"
            )

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            try:
                self._check_size(seen)
            except TooLarge as error:
                if message.get("more_body", False):
                    await _drain(receive)
                raise BodyTooLarge(error) from error
            return message

        return counted


def _check_local(scope: Scope, headers: Headers) -> None:
    client = scope.get("client")
    # a page in a browser on this machine comes from loopback too: where it is from tells it apart
    names = [_host_of(f"//{headers.get('host', '')}"), _host_of(headers.get("origin", "//localhost"))]
    if client is None or not all(map(is_loopback, (client[0], *names))):
        raise Unauthorized(
            "this gateway has no API keys, so it serves its own machine only, at its own address; "
            "set RAYMEM_GATEWAY__API_KEYS or gateway.api_keys"
        )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be reached from its own machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(settings: GatewaySettings) -> None:
    """Refuse to listen to other machines without keys.

    Raises:
        ConfigError: naming the address and the two ways out.
    """
    if not settings.api_keys and not is_loopback(settings.host):
        raise ConfigError(
            f"gateway.host={settings.host!r} can be reached from other machines, and there are no API keys: set "
            "RAYMEM_GATEWAY__API_KEYS (comma-separated) or gateway.api_keys, or listen on 127.0.0.1"
        )


async def _drain(receive: Receive) -> None:
    drained, more = 0, True
    while more and drained < _DRAIN_BYTES:
        message = await receive()
        drained += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
