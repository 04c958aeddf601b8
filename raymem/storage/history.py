"""A bank's past in the cold store: which position a tag or a time means, forks, going back.

All of it is journal positions. A fork is a catalog row that names its parent and the position where it leaves it, and
a journal of its own for what comes after.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import pyarrow as pa

from raymem import inputs
from raymem.errors import BankNotFound, InvalidInput, TagNotFound
from raymem.inputs import named
from raymem.storage.catalog import Catalog, Entry
from raymem.storage.journal.fork_journal import ancestors, steady
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.tombstones import bank_schema
from raymem.storage.store import ColdStore
from raymem.storage.tables.tables import journal_table, snapshot_table
from raymem.types import RestoreReport, shorten

_NAME_MAX = 63


def position_of(cold: ColdStore, entry: Entry, at: str | float) -> int:
    """The position that a tag or a moment means: of a moment, that of the first row whose time is later.

    Times are the writers' own and may go back and forth; with this rule a later moment never means an earlier position,
    and nothing that was stamped later than the moment is ever before its position.

    Args:
        cold: the store.
        entry: the bank.
        at: a tag, seconds since 1970, or a time in ISO 8601 (UTC where it names no zone).

    Raises:
        TagNotFound: neither a tag nor a time, naming the tags there are.
        InvalidInput: a time that no row can have.
    """
    if isinstance(at, str) and at in entry.tags:
        return entry.tags[at]
    moment = seconds(at) if isinstance(at, str) else at
    if moment is None:
        raise TagNotFound(
            f"bank {entry.name} has no tag {shorten(str(at))!r}, which is no time either; its tags are "
            f"{sorted(entry.tags) or 'none'}, a time is 2026-01-31T12:00:00Z or seconds since 1970"
        )
    journal = cold.journal(entry)
    found = journal.before(moment)
    return journal.end() if found is None else found


def fork_position(cold: ColdStore, parent: Entry, at: str | int | None) -> int:
    """The position that a tag, a position or None (the present one) means for a fork.

    Raises:
        TagNotFound, InvalidInput: there is no such tag or position, naming what there is.
    """
    end = cold.journal(parent).end()
    if at is None:
        return end
    if isinstance(at, int):
        if not 0 <= at <= end:
            raise InvalidInput(f"position {at} is not in bank {parent.name}, which has positions 0 to {end}")
        return at
    if at not in parent.tags:
        known = ", ".join(f"{tag} at {pos}" for tag, pos in parent.tags.items()) or "none"
        raise TagNotFound(f"bank {parent.name} has no tag {shorten(at)!r}; its tags: {known}")
    return parent.tags[at]


def fork_at(cold: ColdStore, source: str, target: str, at: str | int | None) -> Entry:
    """Create `target` as a fork of `source` at a tag or a position, by default the present one; no row is copied.

    Raises:
        TagNotFound, InvalidInput: there is no such tag or position. BankExists, BankNotFound. Conflict: rows were
            erased meanwhile.
    """
    parent = cold.catalog.get(source)
    with steady(cold.catalog, parent):
        pos = fork_position(cold, parent, at)
    return cold.catalog.add(fork_of(cold.catalog, parent, target, pos), [])


def restore_to(cold: ColdStore, name: str, at: str | int) -> RestoreReport:
    """Replace a cold bank by its fork at a tag or position; the bank itself lives on under another name.

    Raises:
        TagNotFound, InvalidInput: there is no such tag or position.
        NotOwner: somebody attached the bank meanwhile; nothing was changed.
    """
    old = cold.catalog.get(name)
    pos, end = fork_position(cold, old, at), cold.journal(old).end()
    if pos == end:
        # nothing came after it
        return RestoreReport(name, pos=pos, undone=0, kept_as=None)
    kept_as = free_name(cold.catalog, name)
    cold.catalog.supersede([old], [kept_as], [fork_of(cold.catalog, old, name, pos)])
    return RestoreReport(name, pos=pos, undone=end - pos, kept_as=kept_as)


def materialise(cold: ColdStore, entry: Entry) -> Entry:
    """Copy the rows that a fork inherited into its own journal; return what the bank is now.

    The caller owns the bank and holds its writers back. The rows go to a new table, which the catalog then names.

    Raises:
        NotOwner: somebody else has claimed it meanwhile; nothing was changed.
    """
    if entry.parent is None:
        return entry
    rewritten = dataclasses.replace(entry, generation=entry.next_generation, parent=None, base=0)
    table = journal_table(entry.id, rewritten.generation)
    # what an earlier try left
    cold.catalog.unchanged(entry)
    cold.tables.drop(table)
    journal = cold.journal(entry)
    cold.tables.fill(table, bank_schema(entry.spec, journal.tombstones()), _batches(journal))
    _keep_states(cold, entry, rewritten)
    changed = cold.catalog.change(entry, generation=rewritten.generation, parent=None, base=0)
    for dropped in (journal_table, snapshot_table):
        cold.tables.drop(dropped(entry.id, entry.generation))
    return changed


def materialise_cold(cold: ColdStore, entry: Entry) -> None:
    """As `materialise`, for a bank that nobody owns: it is claimed for as long as it takes.

    Raises:
        NotOwner: somebody else was first; nothing was changed.
    """
    claimed = cold.catalog.claim(entry.name, f"materialising {uuid.uuid4().hex}", entry.epoch)
    try:
        materialise(cold, claimed)
    finally:
        cold.catalog.release(entry.name, claimed.epoch)


def _keep_states(cold: ColdStore, entry: Entry, rewritten: Entry) -> None:
    """Copy the newest state of a bank and those at its tags: they hold what they held."""
    saved = set[int]()
    for upto in (*sorted(entry.tags.values()), None):
        found = cold.state(entry, upto)
        if found is not None and found[0] not in saved and (upto is None or found[0] == upto):
            cold.snapshots(rewritten).save(*found)
            saved.add(found[0])


def _batches(journal: Journal) -> Iterator[pa.RecordBatch]:
    for rows in journal.scan():
        yield from rows.to_arrow().to_batches()


def fork_of(catalog: Catalog, parent: Entry, name: str, pos: int) -> Entry:
    """What the catalog will say of a fork: it names the nearest ancestor that has rows of its own before `pos`."""
    origin = parent
    for ancestor, upto in ancestors(catalog, parent):
        if pos > origin.base:
            break
        origin = ancestor
        assert pos <= upto
    return dataclasses.replace(
        parent,
        id=uuid.uuid4().hex,
        name=name,
        epoch=0,
        owner=None,
        created=time.time(),
        tags={tag: at for tag, at in parent.tags.items() if at <= pos},
        generation=0,
        log=None,
        parent=origin.id if pos else None,
        base=pos,
    )


def free_name(catalog: Catalog, name: str) -> str:
    """A name that is not taken, for what a bank was before it went back."""
    namespace, _, bank = name.partition("/")
    number = 1
    while True:
        ending = "-before-restore" + (f"-{number}" if number > 1 else "")
        found = f"{namespace}/{bank[: _NAME_MAX - len(ending)]}{ending}"
        try:
            catalog.get(found)
        except BankNotFound:
            return found
        number += 1


def seconds(text: str) -> float | None:
    """The moment that a text means, in seconds since 1970; None if it is no time.

    Raises:
        InvalidInput: a time that no row can have, such as 1e400.
    """
    try:
        found = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return None
        found = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return None if found != found else float(named("as_of", inputs.moment, found))
