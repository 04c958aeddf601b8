"""Ways to get durability wrong, put into a process under test: the checker must find each."""

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


def never_let_go() -> None:
    """As `skip_the_fence`, and leases never run out for those who hold them."""
    from raymem.lease import Lease

    skip_the_fence()
    Lease.valid = property(lambda self: self._begun is not None)


MUTATIONS = {
    "": lambda: None,
    "early": acknowledge_before_the_commit,
    "unfenced": skip_the_fence,
    "unleased": never_let_go,
}
