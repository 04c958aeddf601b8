"""From an address to the backend behind it."""

from __future__ import annotations

import asyncio
import os

from raymem.config import Settings, check_key
from raymem.errors import ConfigError
from raymem.host.backend import Backend
from raymem.inputs import shown

_HTTP = ("http://", "https://")


def check_address(uri: object, cold: object, api_key: object, settings: object) -> str:
    """The address as text, if it and what comes with it go together.

    Raises:
        ConfigError: naming the value.
    """
    address = os.fspath(uri) if isinstance(uri, str | os.PathLike) else None
    if not isinstance(address, str) or not _is_text(address):
        raise ConfigError(f"uri is {shown(uri)}; give a folder, 'ray', or an http:// address")
    if cold is not None and not (isinstance(cold, str | os.PathLike) and _is_text(os.fspath(cold))):
        raise ConfigError(f"cold is {shown(cold)}; give text, without line breaks and other controls")
    # what it is must not be told: errors are logged
    if api_key is not None and not isinstance(api_key, str):
        raise ConfigError(f"the API key (api_key) is a {type(api_key).__name__}; give text")
    if api_key:
        check_key(api_key, "the API key (api_key)")
    if not isinstance(settings, Settings | None):
        raise ConfigError(f"settings are {shown(settings)}; give raymem.Settings")
    if api_key is not None and not address.startswith(_HTTP):
        raise ConfigError(f"api_key goes with an http:// address, not with {address!r}")
    if cold is not None and not _is_ray(address):
        raise ConfigError(f"cold={str(cold)!r} goes with 'ray'; {address!r} is its own cold store")
    return address


async def open_backend(address: str, cold: str | None, api_key: str | None, settings: Settings) -> Backend:
    """The backend that an address means: the one place that names rooms above its own, each imported when asked for."""
    if address.startswith(_HTTP):
        from raymem.client.http import HttpBackend

        return await HttpBackend.connect(address, api_key, settings)
    from raymem.partition.backend import partitioned

    if _is_ray(address):
        from raymem.actors.backend import RayBackend

        return partitioned(await RayBackend.connect(address, None if cold is None else os.fspath(cold), settings))
    from raymem.client.local import LocalBackend

    return partitioned(await asyncio.to_thread(LocalBackend, address, settings))


def _is_ray(address: str) -> bool:
    return address == "ray" or address.startswith("ray://")


def _is_text(given: str | bytes) -> bool:
    if not isinstance(given, str) or not given or any(each < " " or each == "\x7f" for each in given):
        return False
    try:
        # a folder's name may have bytes that are no text
        os.fsencode(given)
    except UnicodeEncodeError:
        return False
    return True
