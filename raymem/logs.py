"""Logs: the standard library's `logging`, under "raymem".

Importing raymem sets up no handler: that is the application's choice, and without one Python puts warnings on stderr.
Nothing is logged on stdout, which is for results.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

ROOT = "raymem"
_MOST_KEYS = 64


def get_logger(name: str) -> Any:
    """A logger that takes an event and what belongs to it: `log.warning("bank lost", bank=name)`.

    What an application configures for its own structlog doesn't reach it.
    """
    return structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.processors.format_exc_info, _line],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )


def on_stderr(level: int) -> None:
    """For a command: log on stderr from this level on, once per line however often this is called."""
    logger = logging.getLogger(ROOT)
    logger.setLevel(level)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)


class WarnOnce:
    """Logs a warning the first time that its key comes up, for the first 64 keys: callers choose what keys there are.

    Args:
        log: where to.
    """

    def __init__(self, log: Any) -> None:
        self._log = log
        self._seen: set[tuple[str, ...]] = set()

    def warn(self, key: tuple[str, ...], event: str, **details: Any) -> None:
        """Log `event` unless it was logged for `key` before, or for 64 others."""
        if key in self._seen or len(self._seen) >= _MOST_KEYS:
            return
        self._seen.add(key)
        self._log.warning(event, **details)
        if len(self._seen) == _MOST_KEYS:
            self._log.warning("further warnings of other kinds are counted and no longer logged")


class RateLimit(logging.Filter):
    """Lets `most` records of a logger pass in `window_s` seconds, so that callers can't fill a disk with them."""

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


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is when a line is logged, as it may be replaced."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _line(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    said = [str(event.pop("event", ""))]
    trace = event.pop("exception", None)
    said += [f"{key}={value!r}" for key, value in event.items()]
    return " ".join(said) + (f"\n{trace}" if trace else "")
