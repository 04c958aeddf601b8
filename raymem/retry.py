"""Repeating what failed and may succeed later: after a random pause that grows, within a bound on time or attempts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)
from tenacity.stop import StopBaseT

from raymem.errors import Overloaded

T = TypeVar("T")


async def retrying(
    once: Callable[[], Awaitable[T]],
    on: type[Exception],
    limit_s: float,
    *,
    first_s: float = 0.05,
    longest_s: float = 2.0,
    before_pause: Callable[[], None] = lambda: None,
    stop: Callable[[float], StopBaseT] = stop_before_delay,
) -> T:
    """Call an async function until it returns.

    Pauses are random, so that callers that were refused together don't come back together. After `Overloaded`, a pause
    begins when the error's `retry_after_s` is over.

    Args:
        once: what is called.
        on: the error that may pass; any other one is raised at once.
        limit_s: no call begins so many seconds after the first one.
        first_s: the first pause takes at most so many seconds, each later one at most twice as many.
        longest_s: the most that a pause takes.
        before_pause: called before each pause.
        stop: `stop_after_delay` lets a pause that begins in time end later, and one more call follow.

    Raises:
        Exception: the last error of type `on`, when the time is over.
    """
    spread = wait_random_exponential(multiplier=first_s, max=longest_s)

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return (error.retry_after_s if isinstance(error, Overloaded) else 0.0) + spread(state)

    async def attempt() -> T:
        # tenacity awaits what an async function returns, and nothing else: `once` may be a lambda
        return await once()

    repeated = AsyncRetrying(
        retry=retry_if_exception_type(on),
        stop=stop(limit_s),
        wait=pause,
        before_sleep=lambda _: before_pause(),
        reraise=True,
    )
    return await repeated(attempt)


def attempts(count: int, busy: str, retry_after_s: float) -> Iterator[None]:
    """Loop over the attempts of a change that other changes may cross; break out of it after one that succeeded.

    Raises:
        Overloaded: saying `busy`, after the last attempt.
    """
    pause = wait_random_exponential(multiplier=0.01, max=0.32)
    for attempt in Retrying(stop=stop_after_attempt(count), wait=pause, reraise=True):
        yield
        with attempt:
            raise Overloaded(f"{busy}; try again", retry_after_s=retry_after_s)
