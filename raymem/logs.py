"""Logs: the standard library's `logging`, under "raymem".

Importing raymem sets up no handler: an application decides, and Python itself puts warnings on stderr where it doesn't.
Nothing is ever logged on stdout, which belongs to results.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

ROOT = "raymem"


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


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is when a line is logged: it may be exchanged."""

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
