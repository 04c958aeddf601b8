"""Authentication of callers, and the limit on a body's size: both are checked before a body is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymem.client import routes
from raymem.config import GatewaySettings
from raymem.errors import ConfigError, InvalidInput, RaymemError, TooLarge, Unauthorized
from raymem.host.host import caller
from raymem.serving.errors import NOT_HTTP, Carried, respond

DOCS = "/docs"
# probes need no key, and learn only that the gateway lives
_OPEN = {routes.HEALTH.path, routes.READY.path, "/openapi.json", DOCS}
# no page may frame an answer, guess its type or cache it, and an answer may load nothing
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# what a browser says of a request that was not made by a page of another site
_OWN = {"same-origin", "none"}


class Auth:
    """ASGI middleware that checks API keys (without keys it lets in loopback callers only) and limits bodies.

    It answers a refused request at once; the server reads and drops the body that may still come.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._limit = settings.max_body_bytes
        self._address = f"http://{settings.host}:{settings.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, guarded = Headers(scope=scope), _guarded(send)
        try:
            if scope["path"] not in _OPEN:
                caller.set(self._check_caller(scope, headers))
            said = headers.get("content-length", "0")
            if not (said.isascii() and said.isdecimal()):
                raise InvalidInput(f"Content-Length {said[:40]!r} is no number of bytes")
            self._check_size(int(said[:20]))
        except RaymemError as error:
            status = NOT_HTTP if type(error) is InvalidInput else None
            await respond(error, status)(scope, receive, guarded)
            return
        await self._app(scope, self._counted(receive), guarded)

    def _check_caller(self, scope: Scope, headers: Headers) -> str:
        """The caller's name, which doesn't reveal the key; all loopback callers of a gateway without keys share one."""
        if not self._keys:
            _check_local(scope, headers, self._address)
            return ""
        said = headers.getlist("authorization")
        scheme, _, given = said[0].partition(" ") if len(said) == 1 else ("", "", "")
        # headers are decoded as latin-1, whatever bytes they hold
        key = given.strip().encode("latin-1")
        # every key is compared, so that the time taken reveals nothing
        matches = [hmac.compare_digest(known, key) for known in self._keys]
        if scheme.lower() != "bearer" or not key or not any(matches):
            raise Unauthorized(
                "no API key, or one that is not known here; send `Authorization: Bearer KEY`: "
                "raymem.connect(url, api_key=…), and RAYMEM_API_KEY for the command line"
            )
        return f"key {hashlib.sha256(key).hexdigest()[:16]}"

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
                raise Carried(error) from error
            return message

        return counted


def _guarded(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return guarded


def _check_local(scope: Scope, headers: Headers, address: str) -> None:
    """Let in programs of this machine that call it by a loopback name, and of pages only the gateway's own.

    A page is the gateway's own if it comes from the address that is called, or from `address`, where it listens.

    Raises:
        Unauthorized: another machine, a name that isn't loopback's (DNS rebinding), or another page.
    """
    client, hosts = scope.get("client"), headers.getlist("host")
    called = _split(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
    if client is None or called is None or not (is_loopback(client[0]) and is_loopback(called)):
        raise Unauthorized(
            "this gateway has no API keys, so it serves its own machine only, at its own address; "
            "set RAYMEM_GATEWAY__API_KEYS or gateway.api_keys"
        )
    if not _is_own_page({f"{scope['scheme']}://{hosts[0]}".lower(), address}, headers):
        raise Unauthorized(
            "this gateway has no API keys, so it answers no page of another site; call it from a program, "
            "or set RAYMEM_GATEWAY__API_KEYS or gateway.api_keys"
        )


def _is_own_page(mine: set[str], headers: Headers) -> bool:
    origins = {origin.lower() for origin in headers.getlist("origin")}
    pages = {f"{page.scheme}://{page.netloc}".lower() for page in map(_split, headers.getlist("referer"))}
    return origins | pages <= mine and set(headers.getlist("sec-fetch-site")) <= _OWN


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be reached from its own machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(settings: GatewaySettings) -> None:
    """Refuse to listen for other machines without API keys.

    Raises:
        ConfigError: naming the address and the two fixes.
    """
    if not settings.api_keys and not is_loopback(settings.host):
        raise ConfigError(
            f"gateway.host={settings.host!r} can be reached from other machines, and there are no API keys: set "
            "RAYMEM_GATEWAY__API_KEYS (comma-separated) or gateway.api_keys, or listen on 127.0.0.1"
        )
