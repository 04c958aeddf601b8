"""Two ways to get durability wrong, put into a process under test: the checker must find both."""

from typing import Any


def acknowledge_before_the_commit() -> None:
    """Say that rows are durable once they are queued."""
    import dataclasses

    from raymem.host import Host

    write = Host.write

    async def early(self: Any, name: str, trace: Any, *, durable: bool = True, caller: str = "") -> Any:
        ack = await write(self, name, trace, durable=False, caller=caller)
        return dataclasses.replace(ack, durable=True)

    Host.write = early


def skip_the_fence() -> None:
    """Take a journal and a log over without stopping their old owner."""
    from raymem.cold.fenced import FencedTable

    FencedTable._take_over = lambda self, writer: None


MUTATIONS = {"": lambda: None, "early": acknowledge_before_the_commit, "unfenced": skip_the_fence}
