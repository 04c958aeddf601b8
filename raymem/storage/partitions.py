"""Which parts a bank has, and where the streams of a partitioned one live.

One table has the layouts of all partitioned banks, each change a compare-and-swap. A whole bank is its own only part
and has no row there. A stream is known by a hash of its name: what is left of one that was erased says nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from raymem.errors import BankNotFound, Conflict, InvalidInput, RaymemError
from raymem.storage.catalog import Catalog, Entry, Line, Moment, part_name, part_prefix
from raymem.storage.spellings import spellings
from raymem.storage.tables.cas_table import CasTable, Change, Find
from raymem.storage.tables.tables import Tables, quote
from raymem.types import BankSpec, check_bank_name

_TABLE = "partitions"
MOST = 256
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("bank", pa.string(), nullable=False),
        pa.field("home", pa.int64()),
        pa.field("target", pa.int64()),
        pa.field("held", pa.bool_()),
        pa.field("stale", pa.int64()),
        pa.field("streams", pa.list_(pa.int64())),
        pa.field("version", pa.int64()),
        pa.field("moved", pa.float64()),
        pa.field("swaps", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Layout:
    """The names of a bank's parts: its partitions, or its own where it is whole.

    `version` grows with the partitions and when a stream has moved, last at `moved`. `entry` is the catalog's line of
    the bank itself.
    """

    entry: Entry
    parts: tuple[str, ...]
    version: int = 0
    moved: float = 0.0

    @property
    def id(self) -> str:
        """The bank's id."""
        return self.entry.id

    @property
    def name(self) -> str:
        """The bank's name."""
        return self.entry.name

    @property
    def whole(self) -> bool:
        """Whether the bank is its own only part."""
        return self.entry.state != "split"

    def lines(self, parts: Iterable[Entry]) -> list[Entry]:
        """What the catalog says of the bank and its parts: of a whole bank that is one line."""
        return [*parts] if self.whole else [self.entry, *parts]


@dataclass(frozen=True)
class Place:
    """Where a stream lives.

    On its way to another partition that is its `target`, and while it is `held` it takes no writes. Partition `stale`
    has rows of it that are to be erased there.
    """

    home: int
    target: int | None = None
    held: bool = False
    stale: int | None = None


class Partitions:
    """The partitions of one store's banks; the table is made with the first of them."""

    def __init__(self, tables: Tables, catalog: Catalog) -> None:
        self._catalog = catalog
        self._table = CasTable(tables, _TABLE, "the table of partitions")

    def create(self, name: str, spec: BankSpec, count: int) -> Layout:
        """Add a cold bank of `count` parts; all of them, or none where this raises.

        Raises:
            BankExists: the name is taken.
        """
        layout = self.lay_out(check_bank_name(name), spec, count, {})
        self.add(layout, _new_parts(layout))
        return layout

    def add(
        self,
        layout: Layout,
        parts: Iterable[Entry],
        still: Sequence[Layout] = (),
        journals: Mapping[str, Iterable[pa.RecordBatch]] = MappingProxyType({}),
    ) -> None:
        """Enter a bank in the catalog, all or nothing; without it its layout is forgotten.

        Args:
            layout: the bank's.
            parts: its parts, which are not there yet.
            still: the layouts of the banks that its rows come from, which must not have changed.
            journals: rows of some parts, by their ids.

        Raises:
            BankExists: a name is taken. BankNotFound: a parent is gone. Conflict: streams were or are being moved.
        """

        def revise(_: Moment, lines: Sequence[Entry]) -> Sequence[Entry]:
            for each in still:
                self.require_still(each)
            return lines

        try:
            self._catalog.add_together(layout.lines(parts), journals, revise=revise)
        except RaymemError:
            self.drop(layout.entry)
            raise

    def lay_out(self, name: str, spec: BankSpec, count: int, assignments: Mapping[str, int]) -> Layout:
        """The layout of a bank that is not there yet, with where its streams live; without a bank it does no harm."""
        entry = Entry(uuid.uuid4().hex, name, spec, created=time.time())
        if count == 1:
            return Layout(entry, (name,))
        layout = Layout(dataclasses.replace(entry, state="split"), _part_names(name, count))
        loads = [0] * count
        for home in assignments.values():
            loads[home] += 1
        row = {"id": _id(layout.id), "bank": layout.id, "streams": loads, "version": 0, "moved": 0.0, "swaps": 0}
        rows = [row, *(_stream_row(layout.id, stream, Place(home)) for stream, home in assignments.items())]
        self._table.create(_SCHEMA.empty_table())
        self._swap(layout.id, lambda find: (rows, []))
        return layout

    def copy(self, layout: Layout, name: str) -> tuple[Layout, Layout]:
        """Write down for a bank that is not there yet that its streams live where those of another do.

        A reader of the other one reads it again then.

        Returns:
            The new bank's layout, and the other's as it is now.

        Raises:
            Conflict: streams are being moved, or were.
        """
        entry = dataclasses.replace(layout.entry, id=uuid.uuid4().hex, name=name, created=time.time())
        if layout.whole:
            return Layout(entry, (name,)), layout
        made = dataclasses.replace(layout, entry=entry, parts=_part_names(name, len(layout.parts)))

        def decide(find: Find) -> Change:
            row = self._require(find, layout.id)
            _require_still(find, layout)
            rows = find(f"bank = {quote(layout.id)}")
            # both ids are as long
            copied = [each | {"id": made.id + each["id"][len(made.id) :], "bank": made.id} for each in rows]
            return [*copied, row | {"version": layout.version + 1}], []

        self._swap(layout.id, decide)
        return made, dataclasses.replace(layout, version=layout.version + 1)

    def require_still(self, layout: Layout) -> None:
        """Raise Conflict if a bank is laid out otherwise by now, or streams of it are on their way, or left rows."""
        if not layout.whole:
            _require_still(self._table.rows, layout)

    def get(self, name: str) -> Layout:
        """The layout of a bank as it is now.

        Raises:
            BankNotFound: there is no such bank.
        """
        return self.of(self._catalog.get(name))

    def of(self, entry: Entry) -> Layout:
        """As `get`, of a bank that was looked up."""
        if entry.state != "split":
            return Layout(entry, (entry.name,))
        rows = self._table.rows(f"id = {quote(_id(entry.id))}")
        if not rows:
            raise BankNotFound(f"bank {entry.name} was removed just now")
        parts = _part_names(entry.name, len(rows[0]["streams"]))
        return Layout(entry, parts, rows[0]["version"], rows[0]["moved"])

    def entries(self, layout: Layout) -> list[Entry]:
        """What the catalog says of each part; of a whole bank what it said when the layout was looked up.

        Raises:
            BankNotFound: a partition is gone.
        """
        if layout.whole:
            return [layout.entry]
        found = {entry.name: entry for entry in self._catalog.list(part_prefix(layout.name))}
        missing = [part for part in layout.parts if part not in found]
        if missing:
            raise BankNotFound(f"bank {layout.name} lacks partitions, as if it was being removed: {', '.join(missing)}")
        return [found[part] for part in layout.parts]

    def stands(self, layout: Layout) -> bool:
        """Whether a bank is still laid out so: then a read of all its parts has missed no stream that moved."""
        return layout.whole or bool(self._table.rows(f"id = {quote(_id(layout.id))} AND version = {layout.version}"))

    def part_of(self, layout: Layout, stream: str) -> str:
        """The part in which a stream lives; any, if it has no row yet."""
        if layout.whole:
            return layout.name
        place = self.find(layout.id, stream)
        return part_name(layout.name, 0 if place is None else place.home)

    def find(self, bank: str, stream: str) -> Place | None:
        """Where a stream of the bank of that id lives; None if it has no row yet."""
        row = _rows_of(self._table.rows, bank, [stream]).get(stream)
        return None if row is None else _place(row)

    def assign(self, layout: Layout, streams: Collection[str]) -> dict[str, Place]:
        """Give streams that live nowhere the partition with the fewest; return where all live.

        Of several callers at once the first decides.
        """
        found = _places(self._table.rows, layout, streams)

        def decide(find: Find) -> Change:
            row, there = self._require(find, layout.id), _places(find, layout, streams)
            loads, new = row["streams"], dict[str, Place]()
            for stream in sorted(set(streams) - set(there)):
                home = loads.index(min(loads))
                loads[home] += 1
                new[stream] = Place(home)
            found.update(there | new)
            return [row, *(_stream_row(layout.id, stream, place) for stream, place in new.items())], []

        if len(found) < len(set(streams)):
            self._swap(layout.id, decide)
        return found

    def change(self, layout: Layout, stream: str, before: Place, after: Place) -> Place:
        """Change where a stream lives, if it still lives as looked up; a new home is a new version of the layout.

        Raises:
            Conflict: it doesn't.
        """

        def decide(find: Find) -> Change:
            row = self._require(find, layout.id)
            there = _rows_of(find, layout.id, [stream]).get(stream)
            if there is None or _place(there) != before:
                raise Conflict(f"stream {stream!r} of bank {layout.name} was moved or held by another caller meanwhile")
            if after.home != before.home:
                row |= {"version": row["version"] + 1, "moved": time.time()}
                row["streams"][before.home] -= 1
                row["streams"][after.home] += 1
            return [row, {"id": there["id"], "bank": layout.id, "swaps": 0} | dataclasses.asdict(after)], []

        self._swap(layout.id, decide)
        return after

    def cancel(self, layout: Layout, stream: str | None = None) -> None:
        """Stop a stream on its way, or all: it stays at home, and what was copied is to be erased."""
        which = f"bank = {quote(layout.id)}" if stream is None else _any_of(layout.id, [stream])

        def decide(find: Find) -> Change:
            under_way = find(f"{which} AND target IS NOT NULL")
            return [row | {"target": None, "held": False, "stale": row["target"]} for row in under_way], []

        if self._table.rows(f"{which} AND target IS NOT NULL"):
            self._swap(layout.id, decide)

    def unfinished(self, layout: Layout, streams: Iterable[str]) -> list[str]:
        """Those of the streams that are on their way, or have left rows behind."""
        ids = {row["id"] for row in self._table.rows(_unfinished(layout))}
        return [stream for stream in streams if not ids.isdisjoint(_ids(layout.id, stream))]

    def grow(self, layout: Layout, count: int) -> Layout:
        """Add cold, empty partitions, up to `count`; see `widen`.

        Raises:
            InvalidInput: there are more already.
        """
        has = len(layout.parts)
        if not has <= count <= MOST:
            raise InvalidInput(f"bank {layout.name} has {has} partitions; grow it to between that and {MOST}")
        wider = dataclasses.replace(layout, parts=_part_names(layout.name, count))
        there = {entry.name for entry in self._catalog.list(part_prefix(layout.name))}
        new = [entry for entry in _new_parts(wider) if entry.name not in there]
        if new:
            self._catalog.add_together(new, revise=lambda moment, parts: _alike(moment.get(layout.parts[0]), parts))
        return wider

    def widen(self, layout: Layout) -> None:
        """Let new streams go to the partitions that were added."""

        def decide(find: Find) -> Change:
            row = self._require(find, layout.id)
            loads = row["streams"] + [0] * (len(layout.parts) - len(row["streams"]))
            return [row | {"streams": loads, "version": row["version"] + 1}], []

        self._swap(layout.id, decide)

    def drop(self, entry: Entry | Line) -> None:
        """Forget the layout of a bank, and where its streams live."""

        def decide(find: Find) -> Change:
            return [], [row["id"] for row in find(f"bank = {quote(entry.id)}")]

        if entry.state == "split":
            self._table.swap("forget a layout", "false", "swaps", decide)

    def _swap(self, bank: str, decide: Callable[[Find], Change]) -> None:
        self._table.swap("change where streams live", f"id = {quote(_id(bank))}", "swaps", decide)

    def _require(self, find: Find, bank: str) -> dict[str, Any]:
        rows = find(f"id = {quote(_id(bank))}")
        if not rows:
            raise BankNotFound("the partitioned bank was removed just now")
        return rows[0]


def _alike(first: Entry, parts: Sequence[Entry]) -> list[Entry]:
    """Partitions that are added, with what the first has; at its tags they had no row."""
    tags = dict.fromkeys(first.tags, 0)
    return [dataclasses.replace(part, pinned=first.pinned, ttl_s=first.ttl_s, tags=tags) for part in parts]


def _unfinished(layout: Layout) -> str:
    return f"bank = {quote(layout.id)} AND (target IS NOT NULL OR stale IS NOT NULL)"


def _require_still(find: Find, layout: Layout) -> None:
    if find(_unfinished(layout)):
        raise Conflict(
            f"streams of bank {layout.name} are being moved, or a rebalancing was cut short: try again when it is "
            "over, or finish it: bank.rebalance() (`raymem bank rebalance`)"
        )
    if not find(f"id = {quote(_id(layout.id))} AND version = {layout.version}"):
        raise Conflict(f"the partitions of bank {layout.name} were changed meanwhile; try again")


def _key(stream: str) -> str:
    return hashlib.sha256(stream.encode()).hexdigest()


def _id(bank: str, stream: str | None = None) -> str:
    return f"{bank}/" if stream is None else f"{bank}/{_key(stream)}"


def _any_of(bank: str, streams: Collection[str]) -> str:
    return f"id IN ({', '.join(quote(id) for stream in streams for id in _ids(bank, stream))})"


def _ids(bank: str, stream: str) -> list[str]:
    """Under which a stream may be known: earlier versions took each spelling for a stream of its own."""
    return [_id(bank, name) for name in spellings(stream)]


def _rows_of(find: Find, bank: str, streams: Collection[str]) -> dict[str, dict[str, Any]]:
    rows = {row["id"]: row for row in find(_any_of(bank, streams))}
    known = {stream: next((rows[id] for id in _ids(bank, stream) if id in rows), None) for stream in streams}
    return {stream: row for stream, row in known.items() if row is not None}


def _places(find: Find, layout: Layout, streams: Collection[str]) -> dict[str, Place]:
    return {stream: _place(row) for stream, row in _rows_of(find, layout.id, streams).items()}


def _part_names(name: str, count: int) -> tuple[str, ...]:
    return tuple(part_name(name, index) for index in range(count))


def _new_parts(layout: Layout) -> list[Entry]:
    if layout.whole:
        return [layout.entry]
    made = time.time()
    return [Entry(uuid.uuid4().hex, name, layout.entry.spec, created=made) for name in layout.parts]


def _stream_row(bank: str, stream: str, place: Place) -> dict[str, Any]:
    return {"id": _id(bank, stream), "bank": bank, "swaps": 0} | dataclasses.asdict(place)


def _place(row: dict[str, Any]) -> Place:
    return Place(row["home"], row["target"], bool(row["held"]), row["stale"])
