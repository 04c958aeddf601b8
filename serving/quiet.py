"""Logs that callers can't fill: so many lines in a while, then a count of what was left out."""

from __future__ import annotations

import logging
import time

# what a caller can make speak: the server, its sockets, the gateway's own errors
_LOGGERS = ("uvicorn.error", "asyncio", "raymem.gateway")


class Quiet(logging.Filter):
    """Lets `most` records of a logger pass in `window_s` seconds."""

    def __init__(self, most: int = 20, window_s: float = 10.0) -> None:
        super().__init__()
        self._most = most
        self._window_s = window_s
        self._since = 0.0
        self._seen = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written; the first one of a window says how many were not."""
        now = time.monotonic()
        if now - self._since > self._window_s:
            left_out = self._seen - self._most
            if left_out > 0:
                record.msg = f"({left_out} lines of {record.name} were left out) {record.msg}"
            self._since, self._seen = now, 0
        self._seen += 1
        return self._seen <= self._most


def keep_quiet() -> None:
    """Bound what the loggers write that callers can make speak; doing it again changes nothing."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(found, Quiet) for found in logger.filters):
            logger.addFilter(Quiet())
