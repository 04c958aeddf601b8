"""Leases: how an owner knows that its banks are still its own, and how another process knows that they are not.

An owner's incarnation moves a counter in the cold store every third of its lease. It counts its lease from when the
last successful move *began*; an observer counts from when it first *saw* the counter where it stands. Whatever the
order of events, the owner's count ends first, and no two clocks are ever compared.
"""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Callable

from raymem.errors import RaymemError
from raymem.logs import get_logger
from raymem.storage.lease_table import Incarnation, LeaseTable

log = get_logger("raymem.host.lease")


def clock() -> float:
    """Seconds that only grow, also while the machine sleeps where the system can tell."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class Lease:
    """One incarnation's right to answer for its owner's banks; once it has run out it is over for good.

    Args:
        incarnations: the store's.
        owner: the name under which banks are claimed.
        lease_s: for how long a silence is borne.
    """

    def __init__(self, lease_table: LeaseTable, owner: str, lease_s: float) -> None:
        self.id = uuid.uuid4().hex
        self.owner = owner
        self.lease_s = lease_s
        self._lease_table = lease_table
        self._registering = threading.Lock()
        self._begun: float | None = None
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    def hold(self) -> None:
        """Register on first use and keep the counter moving from then on.

        Raises:
            StorageError: it can't be registered.
        """
        with self._registering:
            if self._begun is not None or self._over.is_set():
                return
            begun = clock()
            self._lease_table.register(self.id, self.owner, self.lease_s)
            self._begun = begun
        # the thread holds the lease only while it beats: one that nobody uses any more ends
        name = f"lease {self.owner}"
        self._keeper = threading.Thread(target=_keep, args=(weakref.ref(self), self._over), name=name, daemon=True)
        self._keeper.start()

    @property
    def valid(self) -> bool:
        """Whether the lease runs: nobody else can own what was claimed under it."""
        if self._over.is_set() or self._begun is None:
            return False
        if clock() - self._begun >= self.lease_s:
            self._over.set()
        return not self._over.is_set()

    @property
    def over(self) -> bool:
        """Whether the lease was held and has run out or was given up."""
        return self._over.is_set() or (self._begun is not None and not self.valid)

    def beat(self) -> None:
        """Move the counter; a lease that ran out meanwhile stays over."""
        begun = clock()
        if not self.valid:
            return
        if not self._lease_table.beat(self.id):
            self._over.set()
        elif self.valid:
            self._begun = begun

    def give_up(self) -> None:
        """End the lease here; others wait until it has run out."""
        self._over.set()

    def release(self) -> None:
        """End the lease here and for everyone: nobody has to wait for it to run out."""
        held = self._begun is not None
        self._over.set()
        if held:
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
        incarnations: the store's.
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
        # who slept, or could not read, has not seen the counter stand still
        return since if beats == seen.beats and now - self._looked < seen.lease_s else now
