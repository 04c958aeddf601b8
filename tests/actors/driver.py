"""A process connected to the cluster that RAY_ADDRESS names: it forks, disconnects, and connects again."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import ray

import raymem
from raymem.errors import RaymemError


def outcome(verb: Callable[[], Any]) -> str:
    try:
        return str(verb())
    except RaymemError as error:
        return f"{type(error).__name__}: {error}"


name = sys.argv[1]
store = raymem.connect("ray")
bank = store.bank(name)
rows = bank.info().rows
found: dict[str, Any] = {}

read_end, write_end = os.pipe()
if (child := os.fork()) == 0:
    told = {"bank": outcome(bank.info), "close": outcome(store.close), "anew": outcome(lambda: raymem.connect("ray"))}
    os.write(write_end, json.dumps(told).encode())
    os._exit(0)
os.close(write_end)
with os.fdopen(read_end) as told:
    found["forked"] = json.loads(told.read())
os.waitpid(child, 0)

ray.shutdown()
verbs = {
    "bank": bank.info,
    "nodes": store.nodes,
    "banks": store.banks,
    "stats": store.stats,
    "tag": lambda: bank.tag("t"),
}
found["shut"] = {verb: outcome(call) for verb, call in verbs.items()}

with raymem.connect("ray") as again:
    assert again.bank(name).info().rows == rows
    again.bank(name).digest()
    # the handle of before, where this process is connected once more
    found["old"] = {verb: outcome(call) for verb, call in (verbs | {"digest": bank.digest}).items()}
    found["closed"] = outcome(store.close)
    assert again.bank(name).info().rows == rows
print(json.dumps(found))
