"""A read-only copy of a bank inside the vLLM worker: loaded from the cold store, kept up to date from the journal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from raymem.bank.replica import Replica
from raymem.encode.keys import ContextRows
from raymem.errors import BankNotFound, RaymemError
from raymem.host.backend import detached
from raymem.logs import get_logger
from raymem.storage.store import ColdStore
from raymem.types import Fingerprint, Readout

log = get_logger("raymem.vllm")


class Follower:
    """One bank, read-only, a fraction of a second behind its owner.

    While the bank is detached from its store, or removed, `live` is False and it is not read.

    Args:
        uri: the cold store that the bank lives in.
        name: the bank.
        device: where its state is kept.
        expect: gets the bank's fingerprint before anything is loaded; raises to refuse it.
        poll_s: seconds between two reads of the journal.

    Raises:
        BankNotFound, BankDetached: the bank is not there, or detached.
    """

    def __init__(
        self, uri: str, name: str, device: str, expect: Callable[[Fingerprint], None], poll_s: float = 0.2
    ) -> None:
        self.name = name
        self.uri = uri
        self._cold = ColdStore.open(uri)
        entry = self._cold.catalog.get(name)
        if entry.state == "cold":
            raise detached(name)
        expect(entry.spec.fingerprint)
        self._device = device
        self._replica = Replica(self._cold, entry, device)
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._poll_s = poll_s
        self.live = True
        self.error = ""
        self._replica.recover()
        self._thread = threading.Thread(target=self._tail, name=f"raymem-follow-{name}", daemon=True)
        self._thread.start()

    @property
    def window(self) -> int:
        """How many consecutive states one key is made of."""
        key = self._replica.spec.key
        return 1 if key.function == "single" else key.window

    def read(self, contexts: Sequence[ContextRows], k: int) -> Readout:
        """Answer rows of several contexts at once, one context after the other; see `Replica.read_contexts`."""
        return self._replica.read_contexts(contexts, k)

    def catch_up(self) -> int:
        """Apply what the journal holds by now; return the rows that this brought.

        Raises:
            RaymemError: the store can't be read, or is corrupt.
        """
        with self._busy:
            try:
                entry = self._cold.catalog.get(self.name)
            except BankNotFound:
                self.live = False
                return 0
            self.live = entry.state != "cold"
            if self.live and entry.generation != self._replica.entry.generation:
                # rows were erased, and the state still has them mixed in
                replica = Replica(self._cold, entry, self._device)
                replica.recover()
                self._replica = replica
                return replica.pos
            return self._replica.catch_up() if self.live else 0

    def stats(self) -> dict[str, Any]:
        """Where it stands."""
        return {
            "store": self.uri,
            "live": self.live,
            "rows": self._replica.pos,
            "bytes": self._replica.nbytes,
            "error": self.error,
        }

    def close(self) -> None:
        """Stop following and free the state."""
        self._stop.set()
        self._thread.join()

    def _tail(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.catch_up()
                self.error = ""
            except RaymemError as error:
                # the store may be unreachable for a while: go on with the rows that are here
                if str(error) != self.error:
                    log.warning("can't follow bank", bank=self.name, code=error.code, reason=str(error))
                self.error = str(error)
                time.sleep(self._poll_s)
