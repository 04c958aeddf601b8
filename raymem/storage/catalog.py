"""The catalog: one LanceDB table that says which banks there are and who owns each."""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import functools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from raymem.errors import (
    BankExists,
    BankNotFound,
    Conflict,
    Corrupt,
    NotOwner,
    Partitioned,
    RaymemError,
)
from raymem.inputs import composed
from raymem.logs import get_logger
from raymem.retry import attempts
from raymem.storage.journal.tombstones import Tombstones, bank_schema
from raymem.storage.tables.cas_table import SWAP_ATTEMPTS, CasTable, Change, Find
from raymem.storage.tables.disk import reading
from raymem.storage.tables.tables import Tables, attended_table, journal_table, quote, snapshot_table
from raymem.types import BankSpec, check_bank_name, check_label, shorten

_TABLE = "catalog"
# no bank can have this name: the row holds the store's nonce, and each creation rewrites it so that two can't cross
_STORE_ROW = ""
_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("spec", pa.string()),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("owner", pa.string()),
        pa.field("state", pa.string()),
        pa.field("created", pa.float64(), nullable=False),
        pa.field("tags", pa.string(), nullable=False),
        pa.field("generation", pa.int64()),
        pa.field("log", pa.string()),
        pa.field("parent", pa.string()),
        pa.field("base", pa.int64()),
        pa.field("pinned", pa.bool_()),
        pa.field("ttl_s", pa.float64()),
    ]
)
_STATES = ("hot", "cold", "split")
_log = get_logger(__name__)
# one owner may rewrite a journal so often
_EPOCH_BITS = 16
# an epoch and the bits of a generation fit an int64 together
_EPOCH_END = 2 ** (62 - _EPOCH_BITS)


@dataclass(frozen=True)
class Entry:
    """One bank's line in the catalog; `id` names its tables and never changes, `epoch` counts its owners.

    `generation` grows with each rewriting of its journal. `log` is the incarnation whose log may hold rows that were
    not flushed to that table. A fork names its `parent` by id: positions under `base` are the parent's. `pinned` banks
    stay hot when room is needed. Rows older than `ttl_s` seconds may be erased. A `split` bank holds nothing itself:
    its rows are in partitions, banks that no user can name.
    """

    id: str
    name: str
    spec: BankSpec
    epoch: int = 0
    owner: str | None = None
    state: Literal["hot", "cold", "split"] = "cold"
    created: float = 0.0
    tags: dict[str, int] = field(default_factory=dict)
    generation: int = 0
    log: str | None = None
    parent: str | None = None
    base: int = 0
    pinned: bool = False
    ttl_s: float | None = None

    @property
    def next_generation(self) -> int:
        """The generation of the next rewriting: a table that no other owner, dead or asleep, can ever write to."""
        return max(self.generation, self.epoch << _EPOCH_BITS) + 1

    def whole(self) -> Entry:
        """This entry, unless the bank is in partitions.

        Raises:
            Partitioned: it is.
        """
        if self.state == "split":
            raise Partitioned(
                f"bank {self.name} is partitioned: it has no journal of its own for this; write and read it through a "
                "store, or make one bank of it: `raymem bank export`, then `import`"
            )
        return self


class Line(NamedTuple):
    """What removing a bank needs to know of it, which may be all that can be read."""

    id: str
    name: str
    generation: int
    epoch: int
    state: str | None
    owner: str | None

    @property
    def tables(self) -> tuple[str, ...]:
        """Its own tables: of its journal, of its snapshots, and of keys and values of its rows."""
        return tuple(table(self.id, self.generation) for table in (journal_table, snapshot_table, attended_table))


class Catalog:
    """Banks by name; every read is up to date and every change is a compare-and-swap, also between processes."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._table = CasTable(tables, _TABLE, "the catalog")
        first = {"name": _STORE_ROW, "id": uuid.uuid4().hex, "epoch": 0, "created": time.time(), "tags": "{}"}
        self._table.create(pa.Table.from_pylist([first], schema=_SCHEMA))

    def nonce(self) -> str:
        """What the store's creator wrote: the same for every process that opens this store."""
        return str(self._store_row()["id"])

    def create(self, name: str, spec: BankSpec) -> Entry:
        """Add a cold bank with an empty journal.

        Raises:
            BankExists: the name is taken; also for all but one of several processes that create it at once.
        """
        entry = Entry(id=uuid.uuid4().hex, name=check_bank_name(name), spec=spec, created=time.time())
        return self.add(entry, [])

    def add(self, entry: Entry, journal: Iterable[pa.RecordBatch], tombstones: Tombstones | None = None) -> Entry:
        """Add an entry as it is, with the rows of its journal; see `create`.

        The table comes first and the row last: a bank that the catalog names has a journal, and one whose journal is
        missing has lost it.

        Args:
            entry: of a new id.
            journal: its rows, in order.
            tombstones: the positions that none of them has.

        Raises:
            BankNotFound: it is a fork, and its parent is gone.
        """
        self.add_together([entry], {entry.id: journal}, tombstones={entry.id: tombstones})
        return entry

    def add_together(
        self,
        entries: Sequence[Entry],
        journals: Mapping[str, Iterable[pa.RecordBatch]] = MappingProxyType({}),
        tombstones: Mapping[str, Tombstones | None] = MappingProxyType({}),
        revise: Callable[[Moment, Sequence[Entry]], Sequence[Entry]] = lambda moment, entries: entries,
    ) -> None:
        """Add several banks, all or none.

        Args:
            entries: of new ids.
            journals: rows of some, by the id; the others have none.
            tombstones: the positions that no row of theirs has.
            revise: makes them what they are to be at the moment of the commit; what it raises is raised.

        Raises:
            BankExists: one of the names is taken. BankNotFound: one is a fork, and its parent is gone.
        """
        # before journals are copied
        if self._table.rows(f"name = {quote(entries[0].name)}"):
            raise _bank_exists(entries[0].name)

        def decide(moment: Moment) -> Sequence[Entry]:
            for entry in entries:
                moment.require_new(entry)
            return revise(moment, entries)

        self._with_journals(entries, journals, tombstones, lambda: self.together(f"create {entries[0].name}", decide))

    def supersede(
        self,
        olds: Sequence[Entry],
        kept_as: Sequence[str],
        news: Sequence[Entry],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Put forks of cold banks in their places, and keep the banks themselves under other names, in one commit.

        Args:
            olds: the banks as they were looked up.
            kept_as: the names under which they live on.
            news: their forks, with the banks' present names, and what else is to be there with them.
            check: raises, at the moment of the commit, if something else stands in the way.

        Raises:
            NotOwner: another process has claimed or rewritten one since it was looked up. BankExists: a name is taken.
        """
        names = dict(zip((old.name for old in olds), kept_as, strict=True))

        def decide(moment: Moment) -> list[Entry]:
            check()
            kept = [dataclasses.replace(moment.require_same(old), name=names[old.name]) for old in olds]
            for new in news:
                moment.require_new(dataclasses.replace(new, name=names.get(new.name, new.name)))
            return [*kept, *news]

        self._with_journals(news, {}, {}, lambda: self.together(f"restore {olds[0].name}", decide))

    def together(self, what: str, decide: Callable[[Moment], Iterable[Entry]]) -> builtins.list[Entry]:
        """Change or add lines depending on what all say at one moment; of two that do so the later looks again.

        That holds where nothing is to be changed too: a change that looked earlier and has not committed looks again.

        Args:
            what: the change in errors.
            decide: gives the lines as they are to be; what it raises is raised, and nothing changed.

        Returns:
            Those lines.
        """
        changed: builtins.list[Entry] = []

        def change(find: Find) -> Change:
            changed[:] = decide(Moment(find))
            return [_entry_row(entry) for entry in changed], []

        self._commit(what, change)
        return changed

    def get(self, name: str) -> Entry:
        """The bank of that name.

        Raises:
            BankNotFound: naming the nearest banks.
        """
        return _entry(self._row(name))

    def line(self, name: str) -> Line:
        """As `get`, also of a bank whose spec or tags can't be read."""
        return _line(self._row(name))

    def lines(self, prefix: str = "", id: str | None = None) -> builtins.list[Line]:
        """As `list`, also those of banks whose spec or tags can't be read; all, or that of one id."""
        only = "" if id is None else f" AND id = {quote(id)}"
        rows = self._table.rows(f"name != '' AND starts_with(name, {quote(prefix)}){only}")
        return sorted((_line(row) for row in rows), key=lambda line: line.name)

    def by_id(self, id: str) -> Entry | None:
        """The bank of that id, whatever its name."""
        rows = self._table.rows(f"id = {quote(id)} AND name != ''")
        return _entry(rows[0]) if rows else None

    def forks(self, id: str) -> builtins.list[Entry]:
        """The banks whose journal begins with rows of this one, by name."""
        rows = self._table.rows(f"parent = {quote(id)}")
        return sorted((_entry(row) for row in rows), key=lambda entry: entry.name)

    def logged(self, log: str) -> builtins.list[Line]:
        """The banks that may have rows in an incarnation's log."""
        return [_line(row) for row in self._table.rows(f"log = {quote(log)}")]

    def list(self, prefix: str = "") -> builtins.list[Entry]:
        """All banks whose name starts with `prefix`, by name; one whose line can't be read is left out, and told of."""
        found = []
        for row in self._table.rows(f"name != '' AND starts_with(name, {quote(prefix)})"):
            try:
                found.append(_entry(row))
            except Corrupt as error:
                _log.warning("bank left out", bank=row["name"], reason=error.message)
        return sorted(found, key=lambda entry: entry.name)

    def owners(self) -> set[str]:
        """Who owns a bank that is hot."""
        with reading("read the catalog"):
            table = self._tables.open(_TABLE)
            found = table.search().where("state = 'hot' AND owner IS NOT NULL").select(["owner"]).to_arrow()
        return set(found["owner"].to_pylist())

    def claim(
        self, name: str, owner: str, expect_epoch: int, log: str | None = None, flushed: str | None = None
    ) -> Entry:
        """Become the owner of a bank whose epoch is `expect_epoch`: the epoch grows by one, the bank is hot.

        The bank's rows may be in `log` from now on, unless an earlier owner's log still holds some: the entry then
        names that one.

        Args:
            name: the bank.
            owner: who claims it.
            expect_epoch: the epoch to claim it from.
            log: the claimer's.
            flushed: the log of the owner at that epoch, if it let the bank go with every row in the bank's own table.

        Raises:
            NotOwner: the epoch has moved on. BankNotFound: there is no such bank.
        """
        values = {"epoch": str(expect_epoch + 1), "owner": quote(owner), "state": "'hot'"}
        if log is not None:
            held = "log" if flushed is None else f"nullif(log, {quote(flushed)})"
            values["log"] = f"coalesce({held}, {quote(log)})"
        changed = self._update(f"name = {quote(name)} AND epoch = {expect_epoch}", sql=values)
        entry = self.get(name)
        if not changed:
            raise _not_owner(entry, expect_epoch)
        if (entry.epoch, entry.owner) != (expect_epoch + 1, owner):
            raise _not_owner(entry, expect_epoch + 1)
        return entry

    def release(self, name: str, epoch: int, state: str = "cold", log: str | None = None) -> None:
        """Give a bank up: it has no owner, keeps its epoch and is `state` ("hot": waiting for its next owner).

        The caller has flushed the bank's rows from its own `log`.

        Raises:
            NotOwner: another epoch owns it. BankNotFound: there is no such bank.
        """
        values = {"owner": "NULL", "state": quote(state)}
        if log is not None:
            values["log"] = f"nullif(log, {quote(log)})"
        if not self._update(f"name = {quote(name)} AND epoch = {epoch}", sql=values):
            raise _not_owner(self.get(name), epoch)

    def disown(self, id: str, owner: str) -> None:
        """As `release`, of whatever bank has this id and owner; nothing if none has."""
        self._update(f"id = {quote(id)} AND owner = {quote(owner)}", sql={"owner": "NULL", "state": "'cold'"})

    def change(self, entry: Entry, **values: Any) -> Entry:
        """Change fields of a bank that is still at this epoch and generation; return what it is now.

        Raises:
            NotOwner: it has another owner, or its journal was rewritten. BankNotFound: there is no such bank.
        """
        where = f"id = {quote(entry.id)} AND epoch = {entry.epoch} AND generation = {entry.generation}"
        if not self._update(where, values):
            raise _not_owner(self.get(entry.name), entry.epoch)
        return self.get(entry.name)

    def require(self, name: str, id: str, epoch: int) -> Entry:
        """The bank as it is now; raise NotOwner unless it is still this one, at this epoch."""
        entry = self.get(name)
        if (entry.id, entry.epoch) != (id, epoch):
            raise _not_owner(entry, epoch)
        return entry

    def unchanged(self, entry: Entry) -> Entry:
        """As `require`; raise NotOwner also if its journal was rewritten: a second rewriting would drop the new one."""
        found = self.get(entry.name)
        if (found.id, found.epoch) != (entry.id, entry.epoch):
            raise _not_owner(found, entry.epoch)
        if found.generation != entry.generation:
            raise NotOwner(f"the journal of {entry.name} was rewritten meanwhile; load the bank again")
        return found

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a bank hot when room is needed, or no longer.

        Raises:
            BankNotFound: there is no such bank.
        """
        if not self._update(f"name = {quote(self.get(name).name)}", {"pinned": pinned}):
            raise BankNotFound(f"no bank {name!r}: it was removed just now")

    def tag(self, name: str, tag: str, pos: int) -> None:
        """Name a journal position; a tag of that name moves."""
        check_label("tag", tag)
        for _ in attempts(SWAP_ATTEMPTS, f"the tags of {name} keep changing", retry_after_s=0.1):
            row = self._row(name)
            values = {"tags": json.dumps(_entry(row).tags | {tag: pos})}
            if self._update(f"id = {quote(row['id'])} AND tags = {quote(row['tags'])}", values):
                return

    def tags(self, name: str) -> dict[str, int]:
        """A bank's tags and their positions."""
        return self.get(name).tags

    def drop(self, entry: Entry | Line) -> None:
        """Take a bank out of the catalog: from here on it does not exist.

        Raises:
            Conflict: it has forks, which read its rows.
            NotOwner: an owner has claimed it since `entry` was looked up. BankNotFound: it is gone already.
        """

        def decide(find: Find) -> Change:
            _require_no_forks(entry, find)
            rows = find(f"id = {quote(entry.id)}")
            if not rows:
                raise BankNotFound(f"bank {entry.name!r} was removed")
            # an owner that a removal doesn't know of would acknowledge rows of a bank that is gone
            if rows[0]["epoch"] != entry.epoch:
                raise NotOwner(f"bank {entry.name!r} was attached meanwhile; remove it again", epoch=rows[0]["epoch"])
            return [], [entry.id]

        self._commit(f"remove {entry.name}", decide)

    def require_no_forks(self, entry: Entry | Line) -> None:
        """Raise Conflict, naming them, if a bank has forks."""
        _require_no_forks(entry, self._table.rows)

    def _store_row(self) -> dict[str, Any]:
        return self._table.rows(f"name = {quote(_STORE_ROW)}")[0]

    def _row(self, name: str) -> dict[str, Any]:
        rows = self._table.rows(f"name = {quote(name)}") if name != _STORE_ROW else []
        if not rows:
            raise BankNotFound(f"no bank {shorten(name)!r}; {self._nearest(name)}")
        return rows[0]

    def _with_journals(
        self,
        entries: Sequence[Entry],
        journals: Mapping[str, Iterable[pa.RecordBatch]],
        tombstones: Mapping[str, Tombstones | None],
        commit: Callable[[], object],
    ) -> None:
        """Make the tables first and the lines last; after an error there are none."""
        tables = {entry.id: journal_table(entry.id, entry.generation) for entry in entries if entry.state != "split"}
        try:
            for entry in entries:
                if entry.id in tables:
                    schema = bank_schema(entry.spec, tombstones.get(entry.id))
                    self._tables.fill(tables[entry.id], schema, journals.get(entry.id, []))
            commit()
        except RaymemError:
            for id in tables:
                if self.by_id(id) is None:
                    self._tables.drop(tables[id])
            raise

    def _commit(self, what: str, decide: Callable[[Find], Change]) -> None:
        """Change several lines at once, depending on what others say: all of it holds at one moment."""
        self._table.swap(what, f"name = {quote(_STORE_ROW)}", "epoch", decide)

    def _update(self, where: str, values: dict[str, Any] | None = None, sql: dict[str, str] | None = None) -> int:
        """Change the row that matches, if it does, to values or SQL expressions: says how many did."""
        changed = self._table.change(
            "update the catalog", lambda table: table.update(where, values, values_sql=sql).rows_updated
        )
        return int(changed)

    def _nearest(self, name: str) -> str:
        names = [entry.name for entry in self.list() if not part_of(entry.name)]
        near = difflib.get_close_matches(name[:200], names, n=3, cutoff=0.7)
        if near:
            return f"nearest: {', '.join(near)}"
        return f"there are {len(names)} banks; list them to see their names" if names else "the store holds no banks"


class Moment:
    """The catalog as it is at one moment, for changes of several lines at once."""

    def __init__(self, find: Find) -> None:
        self._find = find

    def get(self, name: str) -> Entry:
        """The bank of that name.

        Raises:
            BankNotFound: there is none any more.
        """
        rows = self._find(f"name = {quote(name)}")
        if not rows:
            raise _removed(name)
        return _entry(rows[0])

    def parts(self, bank: str) -> list[Entry]:
        """The parts of a bank: its partitions, also those that are just being added, or the bank itself.

        Raises:
            BankNotFound: there are none any more.
        """
        rows = self._find(
            f"starts_with(name, {quote(part_prefix(bank))}) OR (name = {quote(bank)} AND state != 'split')"
        )
        if not rows:
            raise _removed(bank)
        return [_entry(row) for row in rows]

    def require_same(self, entry: Entry) -> Entry:
        """The bank as it is now; raise NotOwner if it was claimed or rewritten since it was looked up."""
        present = [_entry(row) for row in self._find(f"id = {quote(entry.id)}")]
        if not present or (present[0].epoch, present[0].generation) != (entry.epoch, entry.generation):
            raise _not_owner(present[0] if present else entry, entry.epoch)
        return present[0]

    def require_new(self, entry: Entry) -> None:
        """Raise BankExists if its name is taken, BankNotFound if it is a fork whose parent is gone."""
        _require_new(entry, self._find)

    def require_no_forks(self, entry: Entry) -> None:
        """Raise Conflict, naming them, if a bank has forks."""
        _require_no_forks(entry, self._find)


def part_name(bank: str, index: int) -> str:
    """The name of a partition, which no user can give: a bank's name has no dot."""
    return f"{part_prefix(bank)}{index}"


def part_prefix(bank: str) -> str:
    """How the names of all partitions of a bank begin, and no others."""
    return f"{bank}.p"


def part_of(name: str) -> tuple[str, int] | None:
    """The bank that a partition belongs to, and its number; None for any other bank."""
    bank, dot, index = name.rpartition(".p")
    return (bank, int(index)) if dot else None


def _removed(name: str) -> BankNotFound:
    return BankNotFound(f"bank {name} was removed just now")


def bank_of(name: str) -> str:
    """The bank that a partition belongs to; of any other bank its own name."""
    return (part_of(name) or (name, 0))[0]


def _entry_row(entry: Entry) -> dict[str, Any]:
    parsed = {"spec": entry.spec.model_dump_json(), "tags": json.dumps(entry.tags)}
    return {name: getattr(entry, name) for name in _SCHEMA.names} | parsed


def _require_new(entry: Entry, find: Find) -> None:
    if find(f"name = {quote(entry.name)}"):
        raise _bank_exists(entry.name)
    if entry.parent is not None and not find(f"id = {quote(entry.parent)}"):
        raise BankNotFound(f"the bank that {entry.name} is a fork of was removed meanwhile; nothing was created")


def _require_no_forks(entry: Entry | Line, find: Find) -> None:
    # of a partition each is one of a fork
    forks = sorted({bank_of(row["name"]) for row in find(f"parent = {quote(entry.id)}")})
    if forks:
        raise Conflict(
            f"bank {bank_of(entry.name)} has the forks {', '.join(forks)}, which read its rows; remove them first, or "
            "remove it with materialise=True (`raymem bank rm --materialise`), which copies the rows to them",
            forks=forks,
        )


def _bank_exists(name: str) -> BankExists:
    return BankExists(f"bank {name} exists already; choose another name or remove it first")


# a bank's spec never changes, and its line is read for every verb that asks the catalog
_read_spec = functools.lru_cache(maxsize=256)(BankSpec.model_validate_json)


def _entry(row: dict[str, Any]) -> Entry:
    try:
        tags = json.loads(row["tags"])
        parsed = {"spec": _read_spec(row["spec"]).model_copy(deep=True), "tags": tags}
        if any(type(pos) is not int for pos in tags.values()):
            raise ValueError(f"its tags are {tags}")
        # earlier versions took other spellings; of two of one name, the usual one stands
        parsed["tags"] = {composed(tag): pos for tag, pos in tags.items()} | {
            tag: pos for tag, pos in tags.items() if tag == composed(tag)
        }
        if row["state"] not in _STATES:
            raise ValueError(f"its state is {row['state']}")
        for name, end in (("epoch", _EPOCH_END), ("generation", 2**63), ("base", 2**53)):
            if row[name] is None or not 0 <= row[name] < end:
                raise ValueError(f"its {name} is {row[name]}")
    except (ValueError, TypeError, AttributeError) as error:
        raise Corrupt(
            f"the catalog's line for {row['name']} can't be read ({str(error)[:200]}); restore it from an export or a "
            f"copy of the store, or remove it: store.delete(…), `raymem bank rm {row['name']}`"
        ) from error
    return Entry(**(row | parsed))


def _line(row: dict[str, Any]) -> Line:
    return Line(row["id"], row["name"], row["generation"] or 0, row["epoch"], row["state"], row["owner"])


def _not_owner(entry: Entry, epoch: int) -> NotOwner:
    return NotOwner(
        f"bank {entry.name} is at epoch {entry.epoch}, owned by {entry.owner or 'no one'}, not at epoch {epoch}; "
        "look it up again and go to its present owner",
        epoch=entry.epoch,
    )
