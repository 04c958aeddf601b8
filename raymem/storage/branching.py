"""The past of partitioned banks in the cold store: what `raymem.storage.history` does, of all partitions in one commit.

A partition has a position of its own. Where streams live is written down for the new bank before the catalog names it,
and in the same commit it is made sure that no stream has moved since: who moves one looks at the catalog too, after
having said so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raymem.errors import Conflict, InvalidInput, RaymemError, TagNotFound
from raymem.storage.catalog import Entry, Moment
from raymem.storage.history import fork_of, fork_position, free_name
from raymem.storage.journal.fork_journal import steady
from raymem.storage.partitions import Layout
from raymem.storage.store import ColdStore
from raymem.types import RestoreReport, check_label, shorten


def tag_together(cold: ColdStore, layout: Layout, tag: str) -> None:
    """Name the present position of each partition; a tag of that name moves.

    Raises:
        Conflict: streams are being moved.
    """
    check_label("tag", tag)
    ends = {part: cold.journal(cold.catalog.get(part)).end() for part in layout.parts}

    def decide(moment: Moment) -> list[Entry]:
        cold.partitions.require_still(layout)
        parts = moment.parts(layout.name)
        # one that is just being added has no row
        return [_retagged(part, part.tags | {tag: ends.get(part.name, 0)}) for part in parts]

    cold.catalog.together(f"tag {layout.name}", decide)


def untag_together(cold: ColdStore, layout: Layout, tag: str) -> None:
    """Forget a tag of all partitions.

    Raises:
        TagNotFound: naming the tags there are.
    """

    def decide(moment: Moment) -> list[Entry]:
        parts = moment.parts(layout.name)
        if not any(tag in part.tags for part in parts):
            known = sorted(parts[0].tags) or "none"
            raise TagNotFound(f"bank {layout.name} has no tag {shorten(tag)!r}; it has {known}")
        return [_retagged(part, {name: pos for name, pos in part.tags.items() if name != tag}) for part in parts]

    cold.catalog.together(f"untag {layout.name}", decide)


def require_no_past(cold: ColdStore, layout: Layout) -> None:
    """Make sure that nobody reads rows where they are now: later tags and forks will see which streams are moving.

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


def positions_of(cold: ColdStore, layout: Layout, parts: Sequence[Entry], at: str | int | None) -> list[int]:
    """The position in each partition that a tag means, or None: the present one.

    Raises:
        TagNotFound: there is no such tag. InvalidInput: a position, which no two partitions have in common.
    """
    if isinstance(at, int):
        raise InvalidInput(
            f"position {at} of bank {layout.name} is one in each of its partitions; name a tag: bank.tag(…) "
            "(`raymem bank tag`) makes one"
        )
    if at is not None and not all(at in part.tags for part in parts):
        known = sorted(tag for tag in parts[0].tags if all(tag in part.tags for part in parts)) or "none"
        raise TagNotFound(f"bank {layout.name} has no tag {shorten(at)!r}; its tags: {known}")
    with steady(cold.catalog, *parts):
        return [fork_position(cold, part, at) for part in parts]


def fork_together(cold: ColdStore, layout: Layout, target: str, at: str | int | None) -> None:
    """Create `target` as a fork of a partitioned bank at a tag, by default where it is; no row is copied.

    Raises:
        TagNotFound, InvalidInput: there is no such tag. BankExists, BankNotFound. Conflict: streams are being moved, or
            rows were erased meanwhile.
    """
    parents = [cold.catalog.get(part) for part in layout.parts]
    # first: a row that is before its position has a stream that is written down
    positions = positions_of(cold, layout, parents, at)
    made, now = cold.partitions.copy(layout, target)
    forks = _forks(cold, parents, made.parts, positions)

    def still(_: Moment, entries: Sequence[Entry]) -> Sequence[Entry]:
        cold.partitions.require_still(now)
        return entries

    try:
        cold.catalog.add_together([made.entry(), *forks], revise=still)
    except RaymemError:
        cold.partitions.drop(made.id)
        raise


def restore_together(cold: ColdStore, layout: Layout, at: str | int) -> RestoreReport:
    """Replace the partitions, which are all cold, by their forks at a tag; they live on as those of another bank.

    Who knows where streams of the bank live goes on knowing it.

    Raises:
        TagNotFound, InvalidInput: there is no such tag. Conflict: streams are being moved.
        NotOwner: somebody attached a partition meanwhile; nothing was changed.
    """
    olds = [cold.catalog.get(part) for part in layout.parts]
    positions = positions_of(cold, layout, olds, at)
    end = sum(cold.journal(old).end() for old in olds)
    report = RestoreReport(layout.name, pos=sum(positions), undone=end - sum(positions), kept_as=None)
    if not report.undone:
        return report
    kept_as = free_name(cold.catalog, layout.name)
    kept, now = cold.partitions.copy(layout, kept_as)
    forks = _forks(cold, olds, layout.parts, positions)
    try:
        cold.catalog.supersede(olds, kept.parts, [*forks, kept.entry()], lambda: cold.partitions.require_still(now))
    except RaymemError:
        cold.partitions.drop(kept.id)
        raise
    return dataclasses.replace(report, kept_as=kept_as)


def _retagged(part: Entry, tags: dict[str, int]) -> Entry:
    return dataclasses.replace(part, tags=tags)


def _forks(cold: ColdStore, parents: Sequence[Entry], names: Sequence[str], positions: Sequence[int]) -> list[Entry]:
    forks = [fork_of(cold.catalog, *each) for each in zip(parents, names, positions, strict=True)]
    # a later tag may name a position that some had already
    common = set.intersection(*(set(fork.tags) for fork in forks))
    return [_retagged(fork, {tag: pos for tag, pos in fork.tags.items() if tag in common}) for fork in forks]
