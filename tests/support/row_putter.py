"""Processes that die while they keep keys and values, or erase: for each line `STORE VERB TARGET before|after` one."""

import importlib
import os
import signal
import sys
from typing import Any

# not LanceDB, whose threads no fork takes along
import pyarrow  # noqa: F401
import torch

import raymem
from raymem import AttendedRows, Settings
from raymem.config import ColdSettings


def made(stream: str, count: int) -> AttendedRows:
    keys, values = torch.randn(2, 3, count, 2, 4, generator=torch.Generator().manual_seed(0))
    return AttendedRows(stream, "r1", 0, keys, values, rope="theta=10000")


def main(folder: str, verb: str, target: str, when: str) -> None:
    module, owner, name = target.rsplit(".", 2)
    cls = getattr(importlib.import_module(module), owner)
    original = getattr(cls, name)

    def deadly(self: Any, *args: Any, **kwargs: Any) -> Any:
        # of the tables only that of keys and values
        about = str(args[0]) if args and isinstance(args[0], str) else "attended-"
        # of deletions the first clears a rewriting away that no process began
        if not about.startswith("attended-") or (name == "drop" and about.count("-") > 1):
            return original(self, *args, **kwargs)
        if when == "after":
            original(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    with raymem.connect(folder, settings=Settings(cold=ColdSettings(sync="disk"))) as store:
        bank = store.bank("lab/a")
        bank.attach()
        setattr(cls, name, deadly)
        if verb == "put":
            bank.put_rows(made("b", 64))
        else:
            bank.erase(stream="a")


if __name__ == "__main__":
    for line in sys.stdin:
        assert "lancedb" not in sys.modules
        if not (child := os.fork()):
            try:
                main(*line.split())
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
