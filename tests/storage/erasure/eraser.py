"""A process that dies in the middle of an erasure: `eraser.py STORE TARGET before|after`."""

import importlib
import os
import signal
import sys
from typing import Any

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


main(*sys.argv[1:])
