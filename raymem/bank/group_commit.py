"""Group commit: rows that writers of many banks bring while a commit is under way go into the next one together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from raymem.executor import Executor, resolve
from raymem.logs import get_logger
from raymem.storage.journal.log import Log, Part

_log = get_logger("raymem.bank.group_commit")


class GroupCommit:
    """The only one that commits to a host's log: at once when idle, in groups under load, without a timer.

    Args:
        log: the log.
        executor: the host's threads.
        group_bytes: what one commit may hold.
        lost: called once the log is fenced off for good.
    """

    def __init__(self, log: Log, executor: Executor, group_bytes: int, lost: Callable[[], None]) -> None:
        self.log = log
        self.parts = 0
        self.groups = 0
        self.largest = 0
        self.maintenance_errors = 0
        self._executor = executor
        self._group_bytes = group_bytes
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Part, asyncio.Future[None]]] = deque()
        self._tidied: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def commit(self, part: Part) -> None:
        """Return once a bank's rows are durable.

        Raises:
            NotOwner: the log is lost for good. StorageError: nothing is acknowledged, some of it may be there.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((part, done))
        if self._task is None:
            self._task = self._loop.create_task(self._drain(), name=f"log {self.log.id}")
        await done

    def tidy(self) -> asyncio.Future[None]:
        """Begin to take banks that have left out of the log, after the commit that is under way.

        Returns:
            What is done once that was tried; others may wait for the same.
        """
        if self._tidied is None:
            self._tidied = self._loop.create_future()
            if self._task is None:
                self._task = self._loop.create_task(self._drain(), name=f"log {self.log.id}")
        return self._tidied

    def stats(self) -> dict[str, Any]:
        """What the log holds and what its commits took; `group` is how many banks' writes a commit had on average."""
        mine = {"group": self.parts / max(1, self.groups), "largest_group": self.largest}
        return self.log.stats() | mine | {"upkeep_errors": self.maintenance_errors}

    async def _drain(self) -> None:
        try:
            while self._waiting or self._tidied:
                group: list[tuple[Part, asyncio.Future[None]]] = []
                size = 0
                while self._waiting and size < self._group_bytes:
                    group.append(self._waiting.popleft())
                    size += group[-1][0][1].nbytes
                if group:
                    outcome: Exception | None = None
                    try:
                        await self._executor.run(self.log.commit, [part for part, _ in group])
                    except Exception as error:  # noqa: BLE001 - every writer of the group hears it, none is acknowledged
                        outcome = error
                    else:
                        self.groups += 1
                        self.parts += len(group)
                        self.largest = max(self.largest, len(group))
                    for _, done in group:
                        resolve(done, outcome)
                tidied, self._tidied = self._tidied, None
                if self.log.due or (tidied and self.log.left):
                    await self._executor.run(self._maintain)
                if tidied:
                    resolve(tidied, None)
                if self.log.lost:
                    self._lost()
        finally:
            self._task = None

    def _maintain(self) -> None:
        # the group is durable already: what fails here costs time and no data
        try:
            self.log.maintain()
        except Exception as error:  # noqa: BLE001 - the writers that wait must not wait for a task that is gone
            self.maintenance_errors += 1
            _log.warning("the log's maintenance failed", log=self.log.id, error=repr(error))
