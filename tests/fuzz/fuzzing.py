"""How long a fuzzer runs: seconds in `make test`, minutes in `make soak` (FUZZ=soak)."""

import os

from hypothesis import HealthCheck, Phase, settings

# how much longer a soak is
SCALE = 100 if os.environ.get("FUZZ") == "soak" else 1


def bounded(examples: int) -> settings:
    """So many examples, the same in each run; in a soak many more, and others each time."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=SCALE == 1,
        database=None,
        deadline=None,
        # what fails is told as it is: making it smaller takes longer than finding it
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
