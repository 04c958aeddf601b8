"""Reading a fork's journal: its ancestors' rows below the position where it left them, then its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raymem.errors import BankNotFound, Conflict, Corrupt
from raymem.rows import JournalRows
from raymem.storage.catalog import Catalog, Entry
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.tombstones import Tombstones


class ForkJournal(Journal):
    """A fork's journal: it writes its own table, and reads its parent's rows before `base` as if they were there.

    The parent is looked up at each read: its rows may be flushed, its table may be rewritten, it may have another name.
    """

    def scan(self, start: int = 0, stop: int | None = None, batch_rows: int = 4096) -> Iterator[JournalRows]:
        """As `Journal.scan`, from the first ancestor's rows on."""
        if start < self.entry.base:
            yield from self._parent().scan(start, self._upto(stop), batch_rows)
        if stop is None or stop > self.entry.base:
            yield from super().scan(max(start, self.entry.base), stop, batch_rows)

    def streams(self, stop: int | None = None) -> dict[str, int]:
        """As `Journal.streams`, with what the fork inherited."""
        return dict(Counter(self._parent().streams(self._upto(stop))) + Counter(super().streams(stop)))

    def find(self, stream: str, run: str, seq_from: int, seq_to: int, stop: int | None = None) -> dict[int, int]:
        """As `Journal.find`; what the fork inherited is there already."""
        inherited = self._parent().find(stream, run, seq_from, seq_to, self._upto(stop))
        return inherited | super().find(stream, run, seq_from, seq_to, stop)

    def named(self, where: str) -> pa.Table:
        """As `Journal.named`, of the rows that it inherited too."""
        inherited = self._parent().named(where)
        return pa.concat_tables([inherited.filter(pc.less(inherited["pos"], self.entry.base)), super().named(where)])

    def rows(self) -> int:
        """As `Journal.rows`, with those that the fork inherited."""
        return self.end() - len(self.tombstones())

    def tombstones(self) -> Tombstones:
        """As `Journal.tombstones`."""
        return self._parent().tombstones().until(self.entry.base) | super().tombstones()

    def tokens(self, stream: str, run: str, seq_from: int, seq_to: int, stop: int | None = None) -> Tensor:
        """As `Journal.tokens`; a run may go on in the fork."""
        inherited_T = self._parent().tokens(stream, run, seq_from, seq_to, self._upto(stop))
        return torch.cat([inherited_T, super().tokens(stream, run, seq_from, seq_to, stop)])

    def positions(self, stream: str, run: str, seq_from: int, seq_to: int) -> dict[int, int]:
        """As `Journal.positions`, with those that the fork inherited."""
        inherited = self._parent().positions(stream, run, seq_from, seq_to)
        before = {seq: pos for seq, pos in inherited.items() if pos < self.entry.base}
        return before | super().positions(stream, run, seq_from, seq_to)

    def before(self, time: float) -> int | None:
        """As `Journal.before`."""
        inherited = self._parent().before(time)
        return inherited if inherited is not None and inherited < self.entry.base else super().before(time)

    def _upto(self, stop: int | None) -> int:
        return self.entry.base if stop is None else min(stop, self.entry.base)

    def _parent(self) -> Journal:
        parent = self._catalog.by_id(str(self.entry.parent))
        if parent is None:
            _require_unchanged(self._catalog, [self.entry], None)
            raise Corrupt(
                f"the bank that {self.entry.name} was forked from at position {self.entry.base} is not in the catalog; "
                "restore the store from a copy"
            )
        kind = Journal if parent.parent is None else ForkJournal
        return kind(self._tables, self._catalog, parent, self._old_logs)


def ancestors(catalog: Catalog, entry: Entry) -> Iterator[tuple[Entry, int]]:
    """The banks that a fork came from, nearest first, each with the position up to which its rows are the fork's."""
    upto = entry.base
    while entry.parent is not None and (parent := catalog.by_id(entry.parent)) is not None:
        yield parent, upto
        entry, upto = parent, min(upto, parent.base)


@contextmanager
def steady(catalog: Catalog, *entries: Entry) -> Iterator[None]:
    """Inside, banks are read more than once, and each time as they are: what was read must be of one journal each.

    Raises:
        Conflict: rows of one were erased meanwhile, so what was read doesn't fit together or was gone.
        BankNotFound: one was removed meanwhile.
    """
    before = [*entries, *(parent for entry in entries for parent, _ in ancestors(catalog, entry))]
    try:
        yield
    except Corrupt as error:
        _require_unchanged(catalog, before, error)
        raise
    _require_unchanged(catalog, before, None)


def _require_unchanged(catalog: Catalog, before: list[Entry], error: Corrupt | None) -> None:
    for entry in before:
        now = catalog.by_id(entry.id)
        if now is None:
            raise BankNotFound(f"bank {entry.name!r} was removed while it was read", bank=entry.name) from error
        if now.generation != entry.generation:
            raise Conflict(f"rows of bank {entry.name!r} were erased while it was read: do it again") from error
