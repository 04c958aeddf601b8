"""Keys and values of rows, kept beside a bank's journal for a model to attend to: one table a generation of the bank.

A record is a piece: what is kept of 32 rows of a run, from a multiple of 32 on. All of a call's pieces go into one
commit. They are of one format, which the table's metadata says; a fork also has what its ancestors keep of its rows.

Shape legend: `L` attention layers, `N` rows, `H` key/value heads, `d` head width, `R` rows that are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor

from raymem.errors import Conflict, Corrupt, InvalidInput, NotOwner, StorageError, TooLarge
from raymem.inputs import COUNT_END
from raymem.logs import get_logger
from raymem.rows import AttendedRows, RowFormat
from raymem.storage.catalog import Catalog, Entry
from raymem.storage.journal.fork_journal import ancestors
from raymem.storage.journal.tombstones import Tombstones
from raymem.storage.tables.disk import FolderSync, reading, writing
from raymem.storage.tables.tables import Tables, attended_table
from raymem.tensors import from_bytes, to_bytes
from raymem.types import AttendedExtent

PIECE_ROWS = 32
Ints = NDArray[np.int64]
_FORMAT = b"raymem.rows"
_KEY = ["stream", "run", "seq"]
_TENSORS = ("keys", "values", "key_scales", "value_scales")
_SCHEMA = pa.schema(
    [
        pa.field("stream", pa.string(), nullable=False),
        pa.field("run", pa.string(), nullable=False),
        # of the piece: its rows have numbers of their own
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("seqs", pa.list_(pa.int64()), nullable=False),
        pa.field("positions", pa.list_(pa.int64()), nullable=False),
        # of the tensors' bytes, one tensor after another
        pa.field("crc32c", pa.uint32(), nullable=False),
        *(pa.field(name, pa.large_binary()) for name in _TENSORS),
    ]
)
# fragments of so many bytes are left alone, and so many smaller ones are merged
_FRAGMENT_BYTES, _LOOSE = 64 * 2**20, 32
# old versions go after so many calls, or sooner where they may take as much as what is kept
_VERSIONS = 32
# what is decoded at a time
_READ_BYTES = 32 * 2**20
# a reader that opened a version this long ago may still read it to the end
_KEEP_VERSIONS = timedelta(seconds=10)
_log = get_logger(__name__)


@dataclass(frozen=True)
class _Piece:
    """Some of the rows of a piece: their numbers and positions, and tensors [L, n, …]."""

    stream: str
    run: str
    seq: int
    seq_N: Ints
    pos_N: Ints
    tensors: dict[str, Tensor]

    def pick(self, which_N: NDArray[np.bool_]) -> _Piece:
        """Those of the rows for which it is True."""
        index = torch.from_numpy(np.flatnonzero(which_N))
        tensors = {name: tensor[:, index] for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, seq_N=self.seq_N[which_N], pos_N=self.pos_N[which_N], tensors=tensors)

    def over(self, other: _Piece) -> _Piece:
        """These rows, and those of another that are not among them, in order."""
        other = other.pick(~np.isin(other.seq_N, self.seq_N))
        seq_N, pos_N = np.r_[self.seq_N, other.seq_N], np.r_[self.pos_N, other.pos_N]
        order = np.argsort(seq_N)
        index = torch.from_numpy(order)
        tensors = {name: torch.cat([tensor, other.tensors[name]], 1)[:, index] for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, seq_N=seq_N[order], pos_N=pos_N[order], tensors=tensors)

    def ranges(self) -> Iterator[_Piece]:
        """The rows in parts, within which each follows the one before."""
        cuts = np.flatnonzero(np.diff(self.seq_N) != 1) + 1
        for part in np.split(np.arange(len(self.seq_N)), cuts):
            yield self if len(part) == len(self.seq_N) else self.pick(np.isin(np.arange(len(self.seq_N)), part))

    def follows(self, other: _Piece) -> bool:
        """Whether its rows go on where those of another end."""
        return self.run == other.run and int(self.seq_N[0]) == int(other.seq_N[-1]) + 1

    def record(self) -> dict[str, Any]:
        """The piece as a line of the table."""
        blobs = {name: to_bytes(tensor).tobytes() for name, tensor in self.tensors.items()}
        names = {"stream": self.stream, "run": self.run, "seq": self.seq, "seqs": self.seq_N, "positions": self.pos_N}
        return names | {"crc32c": _crc(blobs.values())} | dict.fromkeys(_TENSORS) | blobs


class _Table:
    """A table at one version: for each row that is kept its position, its record, and its place in it."""

    def __init__(self, dataset: Any, bank: Entry) -> None:
        self.dataset = dataset
        self.bank = bank.id
        self.what = what = f"keys and values of {bank.name}"
        with reading(f"read {what}"):
            self.format = RowFormat(**json.loads(dataset.schema.metadata[_FORMAT]))
            lists = dataset.to_table(columns=["positions"])["positions"].combine_chunks()
            lengths = np.asarray(lists.value_lengths())
            self.pos_R = np.asarray(lists.flatten(), dtype=np.int64)
        self.record_R = np.repeat(np.arange(len(lengths)), lengths)
        self.place_R = np.arange(len(self.pos_R)) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    def find(self, pos_N: Ints) -> Ints:
        """Where each position is among the rows, -1 where it isn't."""
        order = np.argsort(self.pos_R, kind="stable")
        at = np.searchsorted(self.pos_R, pos_N, sorter=order)
        found = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(pos_N), np.int64)
        there = self.pos_R[found] == pos_N if len(order) else np.zeros(len(pos_N), bool)
        return np.where(there, found, -1)

    def pieces(self, records: Sequence[int]) -> Iterator[_Piece]:
        """Records by their numbers, checked, some megabytes at a time."""
        yield from map(self._piece, self._taken(records))

    def sound(self, records: Sequence[int]) -> Iterator[_Piece | None]:
        """As `pieces`, with None in the place of one that is damaged."""
        for record in self._taken(records):
            try:
                yield self._piece(record)
            except Corrupt as error:
                _log.warning("keys and values left out", reason=error.message)
                yield None

    def _taken(self, records: Sequence[int]) -> Iterator[dict[str, Any]]:
        at_once = max(1, _READ_BYTES // (PIECE_ROWS * self.format.row_bytes))
        for start in range(0, len(records), at_once):
            with reading(f"read {self.what}"):
                found = self.dataset.take([int(record) for record in records[start : start + at_once]])
            yield from found.to_pylist()

    def contents(self) -> list[tuple[str, str, int, int]]:
        """Stream, run, number and checksum of each record's piece."""
        with reading(f"read {self.what}"):
            found = self.dataset.to_table(columns=[*_KEY, "crc32c"])
        return list(zip(*(found[name].to_pylist() for name in [*_KEY, "crc32c"]), strict=True))

    def keys(self) -> list[tuple[str, str, int]]:
        """Stream, run and number of each record's piece."""
        with reading(f"read {self.what}"):
            found = self.dataset.to_table(columns=_KEY)
        return list(zip(*(found[name].to_pylist() for name in _KEY), strict=True))

    def _piece(self, record: dict[str, Any]) -> _Piece:
        blobs = {name: record[name] for name in _TENSORS if record[name] is not None}
        place = f"{self.what}: rows from {record['seq']} on of run {record['run']!r} of stream {record['stream']!r}"
        if _crc(blobs.values()) != record["crc32c"]:
            raise Corrupt(f"{place} don't match their checksum; put their keys and values again")
        layers, heads, width, _, dtype = self.format
        shape = (layers, len(record["seqs"]), heads)
        kinds: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(blobs, ("float32", shape))
        kinds |= dict.fromkeys(("keys", "values"), (dtype, (*shape, width)))
        tensors = {name: from_bytes(bytearray(blob), *kinds[name]) for name, blob in blobs.items()}
        seq_N, pos_N = (np.array(record[name], dtype=np.int64) for name in ("seqs", "positions"))
        return _Piece(record["stream"], record["run"], record["seq"], seq_N, pos_N, tensors)


class Attended:
    """Keys and values of one bank's rows. Reading works for anyone; the bank's owner alone puts, one call at a time.

    Args:
        tables, catalog: the cold store's.
        entry: the bank.
    """

    def __init__(self, tables: Tables, catalog: Catalog, entry: Entry) -> None:
        self.entry = entry
        self._tables = tables
        self._catalog = catalog
        self._name = attended_table(entry.id, entry.generation)
        self._what = f"keys and values of {entry.name}"
        self._sync: FolderSync | None = tables.folder_sync(self._name)
        # calls and rows since old versions went; another owner may have left some, so the first call looks
        self._calls, self._rows = _VERSIONS, 0

    def extent(self, upto: int = COUNT_END) -> AttendedExtent:
        """How many rows before position `upto` have keys and values, inherited ones too, and their bytes."""
        tables = list(self._found(upto))
        none = np.zeros(0, dtype=np.int64)
        kept = np.unique(np.concatenate([none, *(table.pos_R[table.pos_R < end] for table, end in tables)]))
        return AttendedExtent(len(kept), len(kept) * max((table.format.row_bytes for table, _ in tables), default=0))

    def formats(self) -> set[RowFormat]:
        """What the keys and values are, inherited ones too: one format, unless a fork's ancestor was given another."""
        return {table.format for table, _ in self._found(COUNT_END)}

    def count(self, gone: Tombstones) -> int:
        """How many of the bank's own keys and values are of rows at these positions."""
        table = self._open(self.entry)
        return 0 if table is None else int(gone.has(table.pos_R).sum())

    def get(self, pos_N: Tensor, most_bytes: int = 2**30) -> dict[str, Tensor] | None:
        """Keys and values of rows at these positions [N] int64, in their order; None unless all have them.

        Returns:
            `keys` and `values` [L, N, H, d], int8 or bfloat16; with int8 `key_scales` and `value_scales` [L, N, H].

        Raises:
            Corrupt: a piece doesn't match its checksum. TooLarge: they would take more than `most_bytes`.
        """
        wanted, found = pos_N.numpy(), dict[str, Tensor]()
        missing, form = np.ones(len(wanted), dtype=bool), None
        for table, end in self._found(COUNT_END):
            at_N = np.where(missing & (wanted < end), table.find(wanted), -1)
            if form not in (None, table.format) or not (at_N >= 0).any():
                continue
            form = table.format
            if len(wanted) > (most := most_bytes // form.row_bytes):
                raise TooLarge(f"{len(wanted)} rows of {form.row_bytes} bytes each; attend to {most} at once at most")
            slots = defaultdict[int, list[int]](list)
            for slot in np.flatnonzero(at_N >= 0):
                slots[int(table.record_R[at_N[slot]])].append(int(slot))
            for record, piece in zip(slots, table.pieces(list(slots)), strict=True):
                places = table.place_R[at_N[slots[record]]]
                _fill(found, piece, slots[record], places, len(wanted))
            missing &= at_N < 0
        return None if missing.any() or not found else found

    def put(self, rows: AttendedRows, positions: dict[int, int], most_bytes: int) -> AttendedExtent:
        """Keep what `AttendedRows.checked` gave, in one commit, durable when it returns; rows that are there go.

        Args:
            rows: of one run.
            positions: in the journal, by seq.
            most_bytes: what the bank may keep.

        Returns:
            What it keeps now.

        Raises:
            InvalidInput: a row that is not in the journal. FingerprintMismatch: of another format than those kept.
            TooLarge: more than it may keep. NotOwner: the bank has another owner, or its journal was rewritten.
        """
        self._require(rows, positions)
        entry, kept = self._catalog.unchanged(self.entry), None
        for table, _ in self._found(COUNT_END):
            table.format.require(rows.format)
            kept = table if table.bank == entry.id else kept
        if not len(rows):
            return self.extent()
        new = [*_cut(rows, positions)]
        there = {} if kept is None else {key: at for at, key in enumerate(kept.keys()) if key in set(map(_key, new))}
        if kept is not None and there:
            new = [*_merged(new, kept, there)]
        stays = self._require_room(kept, new, set(there.values()), rows.format.row_bytes, most_bytes)
        self._commit(new, rows.format, replace=bool(there))
        self._require_ours(entry)
        self._tidy(rows.format, stays, sum(len(piece.seq_N) for piece in new))
        return self.extent()

    def of_stream(self, stream: str, upto: int, other: Attended) -> Iterator[AttendedRows]:
        """What the bank itself keeps of a stream's rows before position `upto`, some megabytes of a run at a time.

        Pieces that another bank has just so are left out; so is a damaged one, with a warning.
        """
        table, there = self._open(self.entry), other._open(other.entry)
        if table is None:
            return
        keys, alike = table.contents(), set[tuple[str, str, int, int]]() if there is None else set(there.contents())
        wanted = (at for at, key in enumerate(keys) if key[0] == stream and key not in alike)
        records = sorted(wanted, key=lambda at: keys[at][1:])
        most, waiting = max(1, _READ_BYTES // table.format.row_bytes), list[_Piece]()
        early = (piece.pick(piece.pos_N < upto) for piece in table.sound(records) if piece is not None)
        for part in (part for piece in early if len(piece.seq_N) for part in piece.ranges()):
            if waiting and (sum(len(each.seq_N) for each in waiting) >= most or not part.follows(waiting[-1])):
                yield _as_rows(waiting, table.format.rope)
                waiting = []
            waiting.append(part)
        if waiting:
            yield _as_rows(waiting, table.format.rope)

    def rewrite(self, target: Entry, gone: Tombstones) -> None:
        """Write the rows but those at `gone` to the table of a new generation; a bank that is no fork takes along all.

        Nothing is written where nothing is kept. A damaged piece is left out, with a warning.
        """
        tables = [*self._found(COUNT_END)]
        if target.parent is not None:
            tables = [each for each in tables if each[0].bank == self.entry.id]
        tables = [each for each in tables if each[0].format == tables[0][0].format]
        name = attended_table(target.id, target.generation)
        self._tables.drop(name)
        if tables:
            schema = _schema(tables[0][0].format)
            self._tables.fill(name, schema, (_batch(pieces, schema) for pieces in _together(tables, gone)))

    def _found(self, upto: int) -> Iterator[tuple[_Table, int]]:
        """The tables that have rows of this bank, its own first, each with the position before which they count."""
        entry = self._catalog.by_id(self.entry.id)
        # one that is being made is not in the catalog yet
        entry = self.entry if entry is None or entry.generation < self.entry.generation else entry
        for each, end in [(entry, COUNT_END), *ancestors(self._catalog, entry)]:
            table = self._open(each)
            if table is not None and len(table.pos_R):
                yield table, min(end, upto)

    def _open(self, entry: Entry) -> _Table | None:
        try:
            found = self._tables.open(attended_table(entry.id, entry.generation))
        except Corrupt as error:
            if not error.details.get("missing"):
                raise
            return None
        with reading(f"open keys and values of {entry.name}"):
            dataset = found.to_lance()
        return _Table(dataset, entry)

    def _require(self, rows: AttendedRows, positions: dict[int, int]) -> None:
        missing = [seq for seq in range(rows.seq, rows.seq + len(rows)) if seq not in positions]
        if missing:
            raise InvalidInput(
                f"row {missing[0]} of stream {rows.stream!r} run {rows.run!r} is not in bank {self.entry.name} "
                f"({len(missing)} of {len(rows)} aren't): write the rows first, then their keys and values"
            )

    def _require_ours(self, entry: Entry) -> None:
        """After a commit: the bank is still there, its journal was not rewritten, and no other owner has it."""
        now = self._catalog.by_id(entry.id)
        if now is None or now.generation > entry.generation:
            # a folder that was dropped meanwhile has come back with what was just added
            self._tables.drop(self._name)
            raise NotOwner(f"bank {entry.name} was removed or rewritten meanwhile; nothing was kept")
        if now.epoch != entry.epoch:
            raise NotOwner(f"bank {now.name} has another owner since; put the keys and values again")

    def _require_room(
        self, kept: _Table | None, new: Sequence[_Piece], replaced: set[int], row_bytes: int, most_bytes: int
    ) -> int:
        """How many rows stay as they are, once there is room for the new ones."""
        stay = 0 if kept is None else int((~np.isin(kept.record_R, list(replaced))).sum())
        needed = row_bytes * (stay + sum(len(piece.seq_N) for piece in new))
        if needed > most_bytes:
            raise TooLarge(
                f"keys and values of {self.entry.name} would take {needed} bytes, and a bank may keep {most_bytes}: "
                "raise cold.attended_bytes, or leave them out, to be rebuilt from its tokens",
                needed=needed,
                limit=most_bytes,
            )
        return stay

    def _commit(self, pieces: Sequence[_Piece], form: RowFormat, *, replace: bool) -> None:
        schema = _schema(form)
        table = self._tables.share(self._name, schema.empty_table())
        if RowFormat(**json.loads(table.schema.metadata[_FORMAT])) != form:
            # an empty one, which a first call that was cut short has left
            self._tables.drop(self._name)
            table = self._tables.share(self._name, schema.empty_table())
        rows = pa.Table.from_batches([_batch(pieces, schema)])
        with writing(f"put {self._what}"):
            if replace:
                table.merge_insert(_KEY).when_matched_update_all().when_not_matched_insert_all().execute(rows)
            else:
                table.add(rows)
        self._make_durable()

    def _tidy(self, form: RowFormat, stay: int, new: int) -> None:
        """Merge small fragments, and drop what only older versions need; the rows are durable already."""
        self._calls, self._rows = self._calls + 1, self._rows + new
        target = max(1, _FRAGMENT_BYTES // (PIECE_ROWS * form.row_bytes))
        try:
            with writing(f"compact {self._what}"):
                dataset = self._tables.open(self._name).to_lance()
                counts = [fragment.metadata.physical_rows for fragment in dataset.get_fragments()]
                is_loose = sum(count < target for count in counts) >= _LOOSE
                is_large = self._rows > max(stay + new, target * PIECE_ROWS)
                if not (is_loose or is_large or self._calls >= _VERSIONS):
                    return
                dataset.optimize.compact_files(target_rows_per_fragment=target, materialize_deletions_threshold=0.0)
            # the new files must be on disk before the old ones go
            self._make_durable()
            with writing(f"clean up {self._what}"):
                dataset.cleanup_old_versions(older_than=_KEEP_VERSIONS)
            self._calls = self._rows = 0
        except (Conflict, StorageError) as error:
            # the next call tries again
            _log.warning("not compacted", bank=self.entry.name, reason=error.message)

    def _make_durable(self) -> None:
        if self._sync:
            with writing(f"sync {self._what}"):
                self._sync.sync()


def named_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of some records, one a line: pos, stream, run, seq."""
    lengths = np.asarray(batch["positions"].value_lengths())
    of = pa.array(np.repeat(np.arange(len(lengths)), lengths))
    columns = [batch["positions"].flatten(), batch["stream"].take(of), batch["run"].take(of), batch["seqs"].flatten()]
    return pa.RecordBatch.from_arrays(columns, names=["pos", "stream", "run", "seq"])


def _cut(rows: AttendedRows, positions: dict[int, int]) -> Iterator[_Piece]:
    end = rows.seq + len(rows)
    for seq in range(rows.seq // PIECE_ROWS * PIECE_ROWS, end, PIECE_ROWS):
        first, last = max(seq, rows.seq), min(seq + PIECE_ROWS, end)
        seq_N = np.arange(first, last)
        pos_N = np.array([positions[number] for number in range(first, last)], dtype=np.int64)
        tensors = {name: tensor[:, first - rows.seq : last - rows.seq] for name, tensor in rows.tensors().items()}
        yield _Piece(rows.stream, rows.run, seq, seq_N, pos_N, tensors)


def _merged(new: Sequence[_Piece], kept: _Table, there: dict[tuple[str, str, int], int]) -> Iterator[_Piece]:
    """New pieces with the rows that are kept and not given again; those of a damaged piece are lost."""
    covered = {_key(piece): piece.pos_N for piece in new}
    # a piece whose rows are all given again is not read
    read = {key: at for key, at in there.items() if not np.isin(kept.pos_R[kept.record_R == at], covered[key]).all()}
    old = dict(zip(read, kept.sound(list(read.values())), strict=True))
    for piece in new:
        former = old.get(_key(piece))
        yield piece if former is None else piece.over(former)


def _as_rows(parts: Sequence[_Piece], rope: str) -> AttendedRows:
    """Parts that follow one another, as they were given."""
    tensors = {name: torch.cat([part.tensors[name] for part in parts], 1) for name in parts[0].tensors}
    return AttendedRows(
        parts[0].stream,
        parts[0].run,
        int(parts[0].seq_N[0]),
        keys_LNHd=tensors["keys"],
        values_LNHd=tensors["values"],
        key_scales_LNH=tensors.get("key_scales"),
        value_scales_LNH=tensors.get("value_scales"),
        rope=rope,
    )


def _key(piece: _Piece) -> tuple[str, str, int]:
    return piece.stream, piece.run, piece.seq


def _together(tables: Sequence[tuple[_Table, int]], gone: Tombstones) -> Iterator[list[_Piece]]:
    """Every piece once, some at a time, of the rows in several tables that stay; the first that has a row gives it."""
    where = defaultdict[tuple[str, str, int], list[tuple[int, int]]](list)
    for number, (table, _) in enumerate(tables):
        for record, key in enumerate(table.keys()):
            where[key].append((number, record))
    keys = list(where)
    for start in range(0, len(keys), PIECE_ROWS):
        places = [where[key] for key in keys[start : start + PIECE_ROWS]]
        loaded = dict[tuple[int, int], _Piece]()
        for number, (table, end) in enumerate(tables):
            records = [record for each in places for of, record in each if of == number]
            for record, piece in zip(records, table.sound(records), strict=True):
                if piece is not None:
                    loaded[number, record] = piece.pick(~gone.has(piece.pos_N) & (piece.pos_N < end))
        sound = ([loaded[place] for place in each if place in loaded] for each in places)
        whole = [functools.reduce(_Piece.over, parts) for parts in sound if parts]
        yield [piece for piece in whole if len(piece.seq_N)]


def _fill(found: dict[str, Tensor], piece: _Piece, slots: Sequence[int], places: Ints, count: int) -> None:
    """Put rows of a piece into the slots that are theirs."""
    for name, tensor in piece.tensors.items():
        if name not in found:
            found[name] = tensor.new_empty(tensor.shape[0], count, *tensor.shape[2:])
        found[name][:, list(slots)] = tensor[:, torch.from_numpy(places)]


def _schema(form: RowFormat) -> pa.Schema:
    return _SCHEMA.with_metadata({_FORMAT: json.dumps(form._asdict()).encode()})


def _batch(pieces: Sequence[_Piece], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([piece.record() for piece in pieces], schema=schema)


def _crc(blobs: Iterable[bytes]) -> int:
    crc: int = 0
    for blob in blobs:
        crc = crc32c(blob, crc)
    return crc
