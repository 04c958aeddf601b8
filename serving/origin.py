"""Where a request comes from, for a gateway without keys: this machine, and no page of another site in its browser."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from raymem.errors import Unauthorized

# what a browser says of a request that no other page made
_OWN = {"same-origin", "none"}


def check_local(scope: Scope, headers: Headers, address: str) -> None:
    """Let in callers of this machine, at a name of it; of pages in its browser only the gateway's own.

    A page is the gateway's own if it comes from the very address that is called, or from `address`, where it listens.

    Raises:
        Unauthorized: another machine, a name that isn't loopback's (DNS rebinding), or another page.
    """
    client = scope.get("client")
    hosts = headers.getlist("host")
    if client is None or len(hosts) != 1 or not (is_loopback(client[0]) and is_loopback(_host_of(f"//{hosts[0]}"))):
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
    pages = {_origin_of(page) for page in headers.getlist("referer")}
    return origins | pages <= mine and set(headers.getlist("sec-fetch-site")) <= _OWN


def _origin_of(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}".lower()


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
