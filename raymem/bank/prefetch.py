"""Read ahead: the next item is made while the last one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_AHEAD = 2


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield `items` in order while a thread makes up to two ahead; errors arrive where the item would have."""
    source = iter(items)
    done = object()
    with ThreadPoolExecutor(1, thread_name_prefix="raymem-prefetch") as pool:
        ahead: deque[Future[object]] = deque(pool.submit(next, source, done) for _ in range(_AHEAD))
        while (item := ahead.popleft().result()) is not done:
            ahead.append(pool.submit(next, source, done))
            yield item  # type: ignore[misc]
