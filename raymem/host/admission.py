"""Bounded work in flight, counted per caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from raymem.config import HostSettings
from raymem.errors import Overloaded, TooLarge

# the caller, where one process asks for many: a gateway sets it to the holder of a request's key
caller: ContextVar[str] = ContextVar("caller", default="")


class Limiter:
    """Requests and bytes that each caller has in flight; over the limit a call is refused, never queued."""

    def __init__(self, settings: HostSettings) -> None:
        self._requests = settings.caller_requests
        self._bytes = settings.caller_bytes
        self._in_flight: dict[str, tuple[int, int]] = {}
        self.refused = 0

    @contextmanager
    def admit(self, caller: str, nbytes: int) -> Iterator[None]:
        """Hold a place for one request of `nbytes` while the block runs.

        Raises:
            TooLarge: the request alone is over the byte limit.
            Overloaded: the caller has too much in flight; come back after `retry_after_s`.
        """
        if nbytes > self._bytes:
            raise TooLarge(f"a request of {nbytes} bytes is over the limit of {self._bytes}; send it in pieces")
        requests, held = self._in_flight.get(caller, (0, 0))
        if requests >= self._requests or held + nbytes > self._bytes:
            self.refused += 1
            raise Overloaded(
                f"{requests} requests with {held} bytes are in flight (limits {self._requests} and {self._bytes}); "
                "wait for some to finish",
                retry_after_s=0.05,
            )
        self._in_flight[caller] = (requests + 1, held + nbytes)
        try:
            yield
        finally:
            requests, held = self._in_flight.pop(caller)
            if requests > 1:
                self._in_flight[caller] = (requests - 1, held - nbytes)
