"""Processes that die in the middle of an erasure: for each line `STORE TARGET before|after` one, and how it ended."""

import importlib
import os
import signal
import sys
from typing import Any

# not LanceDB, whose threads no fork takes along
import pyarrow  # noqa: F401
import torch  # noqa: F401

import raymem
from raymem import Settings
from raymem.config import ColdSettings


def main(folder: str, target: str, when: str) -> None:
    module, owner, name = target.rsplit(".", 2)
    cls = getattr(importlib.import_module(module), owner)
    original = getattr(cls, name)

    def deadly(self: Any, *args: Any, **kwargs: Any) -> Any:
        # only tables and changes that an erasure is about, not those of attaching
        about = kwargs.keys() & {"generation"} or (args and str(args[0]).startswith("journal-"))
        # of deletions the first clears a rewriting away that nobody began
        if not about or (name == "drop" and str(args[0]).count("-") > 1):
            return original(self, *args, **kwargs)
        if when == "after":
            original(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    with raymem.connect(folder, settings=Settings(cold=ColdSettings(sync="none"))) as store:
        bank = store.bank("lab/a")
        bank.attach()
        setattr(cls, name, deadly)
        bank.erase(stream="alice")


for line in sys.stdin:
    assert "lancedb" not in sys.modules
    # what takes longest to import is imported once
    if not (child := os.fork()):
        try:
            main(*line.split())
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
