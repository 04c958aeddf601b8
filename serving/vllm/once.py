"""Warnings about what requests ask for: each once, and not for ever, because requests may ask for anything."""

from __future__ import annotations

from typing import Any

from raymem.logs import get_logger

log = get_logger("raymem.vllm")

_MOST = 64


class Once:
    """Logs a warning the first time that its key comes up, for the first 64 keys; then it says so and is silent."""

    def __init__(self) -> None:
        self._said: set[tuple[str, ...]] = set()

    def warn(self, key: tuple[str, ...], event: str, **details: Any) -> None:
        """Log `event` unless it was logged for `key` before, or for 64 others."""
        if key in self._said or len(self._said) >= _MOST:
            return
        self._said.add(key)
        log.warning(event, **details)
        if len(self._said) == _MOST:
            log.warning("further requests of other kinds that can't be followed are counted and no longer logged")
