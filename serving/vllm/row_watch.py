"""Watches the stores of attended banks, so that rows that were erased are attended no longer."""

from __future__ import annotations

import threading

import torch

from raymem.errors import BankNotFound
from raymem.logs import WarnOnce, get_logger
from raymem.serving.vllm.row_index import KeptBank, RowIndex
from raymem.storage.store import ColdStore

log = get_logger("raymem.vllm")
# a store that hangs holds up no shutdown
_CLOSE_S = 5.0


class RowWatch:
    """Brings an index up to date with its banks' stores: erasures, banks that were removed, detached or attached again.

    A store that can't be reached changes nothing, and is asked again: the rows are in the workers.

    Args:
        index: what is attended.
        every_s: seconds between two looks.
    """

    def __init__(self, index: RowIndex, every_s: float) -> None:
        self._index = index
        self._every_s = every_s
        self._stores: dict[str, ColdStore] = {}
        self._once = WarnOnce(log)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch from now on; once is enough."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="raymem-watch-rows", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop; a look that is under way gets five seconds to end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def look(self) -> None:
        """Bring everything up to date now."""
        for name, bank in self._index.followed().items():
            try:
                self._look(name, bank)
            # whatever one bank's store raises, the others' erasures must be seen
            except Exception as error:  # noqa: BLE001
                reason = f"{type(error).__name__}: {error}"
                self._once.warn((name, type(error).__name__), "can't watch bank", bank=name, reason=reason)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()

    def _look(self, name: str, bank: KeptBank) -> None:
        if bank.store not in self._stores:
            self._stores[bank.store] = ColdStore.open(bank.store)
        cold = self._stores[bank.store]
        try:
            entry = cold.catalog.get(name)
        except BankNotFound:
            self._index.release(name, bank.id)
            return
        if entry.id != bank.id:
            self._index.release(name, bank.id)
            return
        self._index.set_live(name, bank.id, entry.state == "hot")
        if entry.generation != bank.generation:
            ranges = cold.journal(entry).tombstones().ranges_R2.tolist()
            empty = [torch.zeros(0, dtype=torch.int64)]
            positions_E = torch.cat(empty + [torch.arange(start, stop) for start, stop in ranges])
            self._index.erased(name, bank.id, entry.generation, positions_E)
