"""A bank's past in the cold store: which position a tag or a time means, tags, forks, going back.

All of it is journal positions, one in each part of the bank, and changes in one commit for all parts. A fork is a
catalog row that names its parent and the position where it leaves it, and a journal of its own for what comes after.

Where the streams of a partitioned bank live is written down for the new bank before the catalog names it, and in the
same commit it is made sure that no stream has moved since: a mover looks at the catalog too, after it has said so.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import pyarrow as pa

from raymem import inputs
from raymem.errors import BankNotFound, Conflict, InvalidInput, RaymemError, TagNotFound
from raymem.inputs import named
from raymem.storage.catalog import Catalog, Entry, Moment, bank_of
from raymem.storage.journal.fork_journal import ancestors, steady
from raymem.storage.journal.journal import Journal
from raymem.storage.journal.tombstones import bank_schema
from raymem.storage.partitions import Layout
from raymem.storage.store import ColdStore
from raymem.storage.tables.tables import attended_table, journal_table, snapshot_table
from raymem.types import RestoreReport, check_label, shorten

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
    moment = moment_of(entry, at)
    if moment is None:
        return entry.tags[str(at)]
    journal = cold.journal(entry)
    found = journal.before(moment)
    return journal.end() if found is None else found


def moment_of(entry: Entry, at: str | float) -> float | None:
    """The moment that `at` means, in seconds since 1970; None if it is a tag of a bank or partition."""
    if isinstance(at, str) and at in entry.tags:
        return None
    moment = seconds(at) if isinstance(at, str) else at
    if moment is None:
        raise TagNotFound(
            f"bank {bank_of(entry.name)} has no tag {shorten(str(at))!r}, which is no time either; its tags are "
            f"{sorted(entry.tags) or 'none'}, a time is 2026-01-31T12:00:00Z or seconds since 1970"
        )
    return moment


def positions_of(cold: ColdStore, parts: Sequence[Entry], at: str | int | None) -> tuple[list[int], list[int]]:
    """The position in each part of a bank that a tag, a position or None (the present one) means, and where each ends.

    Raises:
        TagNotFound, InvalidInput: there is no such tag or position, naming what there is; a position means nothing in a
            bank of partitions, each of which has its own.
        Conflict: rows were erased meanwhile.
    """
    name = bank_of(parts[0].name)
    if isinstance(at, int) and name != parts[0].name:
        raise InvalidInput(
            f"position {at} of bank {name} is one in each of its partitions; name a tag: bank.tag(…) "
            "(`raymem bank tag`) makes one"
        )
    with steady(cold.catalog, *parts):
        ends = [cold.journal(part).end() for part in parts]
    if at is None:
        return ends, ends
    if isinstance(at, int):
        if not 0 <= at <= ends[0]:
            raise InvalidInput(f"position {at} is not in bank {name}, which has positions 0 to {ends[0]}")
        return [at], ends
    tags = common_tags([part.tags for part in parts])
    if at not in tags:
        known = ", ".join(f"{tag} at {pos}" for tag, pos in tags.items()) or "none"
        raise TagNotFound(f"bank {name} has no tag {shorten(at)!r}; its tags: {known}")
    return [part.tags[at] for part in parts], ends


def common_tags(tags: Sequence[dict[str, int]]) -> dict[str, int]:
    """The tags that all parts have, each with the positions of all together."""
    return {tag: sum(each[tag] for each in tags) for tag in tags[0] if all(tag in each for each in tags)}


def tag_end(cold: ColdStore, name: str, tag: str) -> dict[str, int]:
    """Name the present position of each part, in one commit; a tag of that name moves. Return all tags.

    Raises:
        Conflict: streams are being moved.
    """
    check_label("tag", tag)
    layout = cold.partitions.get(name)
    ends = {part.name: cold.journal(part).end() for part in cold.partitions.entries(layout)}

    def decide(moment: Moment) -> list[Entry]:
        cold.partitions.require_still(layout)
        # a partition that is just being added has no row
        return [_retagged(part, part.tags | {tag: ends.get(part.name, 0)}) for part in moment.parts(name)]

    return common_tags([part.tags for part in cold.catalog.together(f"tag {name}", decide)])


def untag(cold: ColdStore, name: str, tag: str) -> dict[str, int]:
    """Forget a tag of all parts; return those that are left.

    Raises:
        TagNotFound: naming the tags there are.
    """

    def decide(moment: Moment) -> list[Entry]:
        parts = moment.parts(name)
        if not any(tag in part.tags for part in parts):
            known = sorted(parts[0].tags) or "none"
            raise TagNotFound(f"bank {name} has no tag {shorten(tag)!r}; it has {known}")
        return [_retagged(part, {each: pos for each, pos in part.tags.items() if each != tag}) for part in parts]

    return common_tags([part.tags for part in cold.catalog.together(f"untag {name}", decide)])


def require_no_past(cold: ColdStore, layout: Layout) -> None:
    """Make sure that no rows are read where they are now: later tags and forks will see which streams are moving.

    Raises:
        Conflict: the bank has tags or forks, or is a fork.
    """

    def decide(moment: Moment) -> list[Entry]:
        for part in moment.parts(layout.name):
            if part.tags:
                raise Conflict(
                    f"bank {layout.name} has the tags {', '.join(sorted(part.tags))}, and a stream that moves "
                    "leaves its past: export the bank if you need it, and remove them: bank.untag(…)"
                )
            if part.parent is not None:
                raise Conflict(
                    f"bank {layout.name} is a fork, which reads rows where its parent has them: give it its own before "
                    "streams are moved: bank.materialise() (`raymem bank materialise`)"
                )
            moment.require_no_forks(part)
        return []

    cold.catalog.together(f"look whether {layout.name} has a past", decide)


def fork_at(cold: ColdStore, source: str, target: str, at: str | int | None) -> Entry:
    """Create `target` as a fork of `source` at a tag or a position, by default the present one; no row is copied.

    Raises:
        TagNotFound, InvalidInput: there is no such tag or position. BankExists, BankNotFound. Conflict: streams are
            being moved, or rows were erased meanwhile.
    """
    layout = cold.partitions.get(source)
    parents = cold.partitions.entries(layout)
    # first: a row that is before its position has a stream that is written down
    positions, _ = positions_of(cold, parents, at)
    made, now = cold.partitions.copy(layout, target)
    forks = _forks(cold, parents, made.parts, positions)
    cold.partitions.add(made, forks, [now])
    return forks[0] if made.whole else made.entry


def restore_to(cold: ColdStore, name: str, at: str | int) -> RestoreReport:
    """Replace the parts of a bank, which are all cold, by their forks at a tag or position; they live on as another's.

    A caller that knows where streams of the bank live goes on knowing it.

    Raises:
        TagNotFound, InvalidInput: there is no such tag or position. Conflict: streams are being moved.
        NotOwner: a part was attached meanwhile; nothing was changed.
    """
    layout = cold.partitions.get(name)
    olds = cold.partitions.entries(layout)
    positions, ends = positions_of(cold, olds, at)
    report = RestoreReport(name, pos=sum(positions), undone=sum(ends) - sum(positions), kept_as=None)
    if not report.undone:
        return report
    kept_as = _free_name(cold.catalog, name)
    kept, now = cold.partitions.copy(layout, kept_as)
    news = kept.lines(_forks(cold, olds, layout.parts, positions))
    try:
        cold.catalog.supersede(olds, kept.parts, news, lambda: cold.partitions.require_still(now))
    except RaymemError:
        cold.partitions.drop(kept.entry)
        raise
    return dataclasses.replace(report, kept_as=kept_as)


def materialise(cold: ColdStore, entry: Entry) -> Entry:
    """Copy the rows that a fork inherited into its own journal; return what the bank is now.

    The caller owns the bank and holds its writers back. The rows go to a new table, which the catalog then names.

    Raises:
        NotOwner: another owner has claimed it meanwhile; nothing was changed.
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
    cold.attended(entry).rewrite(rewritten, journal.tombstones())
    changed = cold.catalog.change(entry, generation=rewritten.generation, parent=None, base=0)
    for dropped in (journal_table, snapshot_table, attended_table):
        cold.tables.drop(dropped(entry.id, entry.generation))
    return changed


def materialise_cold(cold: ColdStore, entry: Entry) -> None:
    """As `materialise`, for a bank without an owner: it is claimed for as long as it takes.

    Raises:
        NotOwner: another claim came first; nothing was changed.
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


def _retagged(part: Entry, tags: dict[str, int]) -> Entry:
    return dataclasses.replace(part, tags=tags)


def _forks(cold: ColdStore, parents: Sequence[Entry], names: Sequence[str], positions: Sequence[int]) -> list[Entry]:
    forks = [_fork_of(cold.catalog, *each) for each in zip(parents, names, positions, strict=True)]
    # a later tag may name a position that some had already
    common = common_tags([fork.tags for fork in forks])
    return [_retagged(fork, {tag: pos for tag, pos in fork.tags.items() if tag in common}) for fork in forks]


def _fork_of(catalog: Catalog, parent: Entry, name: str, pos: int) -> Entry:
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


def _free_name(catalog: Catalog, name: str) -> str:
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
