import time

import pytest
from tenacity import stop_after_delay

from raymem.errors import Overloaded, StorageError, Unavailable
from raymem.retry import attempts, retrying


def failing(*errors: Exception):
    """A call that raises these errors one after the other, then returns how many there were."""
    left = list(errors)

    async def once() -> int:
        if left:
            raise left.pop(0)
        return len(errors)

    return once


async def test_an_error_that_passes_is_repeated_after_a_pause():
    pauses: list[None] = []
    once = failing(Unavailable("a"), StorageError("b"))
    found = await retrying(once, Unavailable, 10, first_s=0.001, before_pause=lambda: pauses.append(None))
    assert (found, len(pauses)) == (2, 2)


async def test_another_error_is_raised_at_once():
    with pytest.raises(StorageError, match="disk"):
        await retrying(failing(StorageError("disk")), Overloaded, 10)


async def test_the_last_error_is_raised_when_there_is_no_time_for_a_pause():
    began = time.perf_counter()
    with pytest.raises(Overloaded, match="second"):
        await retrying(
            failing(Overloaded("first", retry_after_s=0), Overloaded("second", retry_after_s=60)), Overloaded, 5
        )
    assert time.perf_counter() - began < 5


async def test_a_pause_lasts_as_long_as_the_error_says():
    began = time.perf_counter()
    assert await retrying(failing(Overloaded("busy", retry_after_s=0.1)), Overloaded, 10, first_s=0.001) == 1
    assert time.perf_counter() - began >= 0.1


async def test_a_pause_that_outlasts_the_limit_can_be_followed_by_one_call():
    refused = Overloaded("busy", retry_after_s=0.1)
    with pytest.raises(Overloaded):
        await retrying(failing(refused), Overloaded, 0.05, first_s=0.001)
    assert await retrying(failing(refused), Overloaded, 0.05, first_s=0.001, stop=stop_after_delay) == 1


def test_a_change_that_is_always_crossed_is_given_up():
    with pytest.raises(Overloaded, match="the catalog is busy; try again") as caught:
        list(attempts(3, "the catalog is busy", retry_after_s=0.5))
    assert caught.value.retry_after_s == 0.5


def test_there_are_no_more_attempts_than_said():
    loop = attempts(3, "busy", retry_after_s=0.5)
    assert [next(loop) for _ in range(3)] == [None] * 3
    with pytest.raises(Overloaded):
        next(loop)


def test_a_change_that_succeeds_ends_the_loop():
    for _ in attempts(1, "busy", retry_after_s=0.5):
        break
