"""Coming back to one who has too much to do: when it says, and for a bounded time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_before_delay, wait_random_exponential

from raymem.errors import Overloaded

P = ParamSpec("P")
T = TypeVar("T")
# callers that were refused together must not come back together
_SPREAD = wait_random_exponential(multiplier=0.05, max=2.0)


async def retrying(retry_s: float, once: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call an async function, and after a refusal again: a little later than that says, and within `retry_s` seconds.

    Raises:
        Overloaded: the last refusal, once there is no time left.
    """
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(Overloaded), stop=stop_before_delay(retry_s), wait=_pause, reraise=True
    )
    return await retrying(once, *args, **kwargs)


def _pause(state: RetryCallState) -> float:
    refusal = state.outcome.exception() if state.outcome else None
    return (refusal.retry_after_s if isinstance(refusal, Overloaded) else 0.0) + _SPREAD(state)
