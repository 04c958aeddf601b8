"""Locks by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

L = TypeVar("L")


class Locks(Generic[L]):
    """One lock for each key, kept only while a caller holds or awaits it: keys come from callers and never end.

    Args:
        make: makes one.
    """

    def __init__(self, make: Callable[[], L]) -> None:
        self._make = make
        self._locks: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def __getitem__(self, key: Hashable) -> L:
        lock: L = self._locks.setdefault(key, self._make())
        return lock

    def __len__(self) -> int:
        return len(self._locks)
