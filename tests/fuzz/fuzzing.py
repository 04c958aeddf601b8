"""How long a fuzzer runs: seconds in `make test`, with the same examples in each run; FUZZ_S seconds in `make soak`."""

import functools
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, Phase, settings

# seconds of each fuzzer, with other examples each time; none in `make test`
SECONDS = float(os.environ.get("FUZZ_S", "0"))


def lasting(count: int, share: int = 1) -> Iterator[int]:
    """Numbers from 0: `count` of them, and more in a soak until a fuzzer's time divided by `share` is over."""
    end = time.monotonic() + SECONDS / share
    for number in itertools.count():
        if number >= count and time.monotonic() >= end:
            return
        yield number


def seeded(seed: int) -> random.Random:
    """The same dice in each run, others in each soak."""
    return random.Random(None if SECONDS else seed)


def bounded(examples: int, share: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples; in a soak so many again until the time that `lasting` gives is over."""
    once = settings(
        max_examples=examples,
        derandomize=not SECONDS,
        database=None,
        deadline=None,
        # what fails is told as it is: making it smaller takes longer than finding it
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def decorate(holds: Callable[..., None]) -> Callable[..., None]:
        tried = once(holds)

        @functools.wraps(tried)
        def again(*args: object, **kwargs: object) -> None:
            for _ in lasting(1, share):
                tried(*args, **kwargs)

        return again

    return decorate
