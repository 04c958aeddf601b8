"""Leases: how an owner knows that its banks are still its own, and how another process knows that they are not.

An owner's incarnation moves a counter in the cold store every third of its lease. It counts its lease from when the
last successful move *began*; an observer counts from when it first *saw* the counter where it stands. Whatever the
order of events, the owner's count ends first, and no two clocks are ever compared.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from functools import partial

from raymem.errors import RaymemError
from raymem.logs import get_logger
from raymem.storage.lease_table import Incarnation, LeaseTable

log = get_logger("raymem.host.lease")


_BOOT = getattr(time, "CLOCK_BOOTTIME", None)
# seconds that only grow, also while the machine sleeps where the system can tell
clock: Callable[[], float] = time.monotonic if _BOOT is None else partial(time.clock_gettime, _BOOT)


class Lease:
    """One incarnation's right to answer for its owner's banks; once it has run out it is over for good.

    Before `deadline`, by `clock`, no other process can own what was claimed under it. Until it is held, and once it was
    given up, that is minus infinity.

    Args:
        lease_table: the store's.
        owner: the name under which banks are claimed.
        lease_s: for how long a silence is borne.
    """

    def __init__(self, lease_table: LeaseTable, owner: str, lease_s: float) -> None:
        self.id = uuid.uuid4().hex
        self.owner = owner
        self.lease_s = lease_s
        self.held = False
        self.deadline = -math.inf
        self._lease_table = lease_table
        self._registering = threading.Lock()
        # a beat that succeeds must not take back what was given up meanwhile
        self._moving = threading.Lock()
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    def hold(self) -> None:
        """Register on first use and keep the counter moving from then on.

        Raises:
            StorageError: it can't be registered.
        """
        with self._registering:
            if self.held or self._over.is_set():
                return
            begun = clock()
            self._lease_table.register(self.id, self.owner, self.lease_s)
            with self._moving:
                self.held = True
                self.deadline = -math.inf if self._over.is_set() else begun + self.lease_s
        # the thread holds the lease only while it beats: one that is not used any more ends
        name = f"lease {self.owner}"
        self._keeper = threading.Thread(target=_keep, args=(weakref.ref(self), self._over), name=name, daemon=True)
        self._keeper.start()

    def beat(self) -> None:
        """Move the counter; a lease that ran out meanwhile stays over."""
        begun = clock()
        if begun >= self.deadline or not self._lease_table.beat(self.id):
            self.give_up()
            return
        with self._moving:
            if clock() < self.deadline:
                self.deadline = begun + self.lease_s

    def give_up(self) -> None:
        """End the lease here; others wait until it has run out."""
        with self._moving:
            self._over.set()
            self.deadline = -math.inf

    def release(self) -> None:
        """End the lease here and for everyone: other owners need not wait for it to run out."""
        self.give_up()
        if self.held:
            self._lease_table.retire(self.id)
        if self._keeper is not None and self._keeper is not threading.current_thread():
            # the process may end now, and a thread that it cuts off within LanceDB would abort it
            self._keeper.join(self.lease_s)


def _keep(found: weakref.ref[Lease], over: threading.Event) -> None:
    lease = found()
    while lease is not None:
        pause_s, lease = lease.lease_s / 3, None
        if over.wait(pause_s) or (lease := found()) is None:
            return
        try:
            lease.beat()
        except RaymemError as error:
            # the store may answer again before the lease has run out
            log.warning("lease not renewed", owner=lease.owner, error=str(error))


class Watch:
    """One observer's view of other owners' leases.

    Args:
        lease_table: the store's.
        now: the observer's own clock, in seconds.
    """

    def __init__(self, lease_table: LeaseTable, now: Callable[[], float] = clock) -> None:
        self._lease_table = lease_table
        self._now = now
        self._looked = -float("inf")
        self._since: dict[str, tuple[int, float]] = {}

    def living(self) -> dict[str, float]:
        """Look once: owners whose leases may still run, and for how many seconds each has stood still here.

        A lease is over when its counter stood still for all of it while this observer looked on; then its incarnation
        is ended. Look at least three times a lease: a gap that long starts the count again.
        """
        found = self._lease_table.list()
        # after the look: what it found may have been written while it lasted
        now = self._now()
        known = {seen.id: self._first_seen(seen, now) for seen in found}
        self._looked, self._since = now, {seen.id: (seen.beats, known[seen.id]) for seen in found}
        return {
            seen.owner: now - known[seen.id]
            for seen in found
            if now - known[seen.id] < seen.lease_s or not self._lease_table.expire(seen)
        }

    def _first_seen(self, seen: Incarnation, now: float) -> float:
        beats, since = self._since.get(seen.id, (-1, now))
        # an observer that slept, or could not read, has not seen the counter stand still
        return since if beats == seen.beats and now - self._looked < seen.lease_s else now
