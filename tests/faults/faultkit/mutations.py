"""Ways to get durability wrong, put into a process under test: the checker must find each."""

import importlib
import math
from typing import Any


def acknowledge_before_the_commit(host: Any) -> None:
    """Say that rows are durable once they are queued."""
    import dataclasses

    write = host.Host.write

    async def early(self: Any, name: str, trace: Any, *, durable: bool = True, caller: str = "") -> Any:
        ack = await write(self, name, trace, durable=False, caller=caller)
        return dataclasses.replace(ack, durable=True)

    host.Host.write = early


def skip_the_fence(fenced: Any) -> None:
    """Take a journal and a log over without stopping their old owner."""
    fenced.SingleWriterTable._bar = lambda self, handle, dataset: self._is_latest(handle, dataset.version)


def never_let_go(lease: Any) -> None:
    """A lease never runs out for the one that holds it."""
    lease.Lease.deadline = property(lambda self: math.inf if self.held else -math.inf, lambda self, deadline: None)


# what each does to which module, once that is loaded and not while it loads others
MUTATIONS = {
    "": {},
    "early": {"raymem.host.host": acknowledge_before_the_commit},
    "unfenced": {"raymem.storage.tables.single_writer_table": skip_the_fence},
    "unleased": {"raymem.storage.tables.single_writer_table": skip_the_fence, "raymem.host.lease": never_let_go},
}


def mutate(name: str) -> None:
    """Do all that a mutation does."""
    for module, change in MUTATIONS[name].items():
        change(importlib.import_module(module))
