"""Rows: as a caller gives them, as the journal keeps them, as Arrow, and the checksum that ties these together.

Shape legend: `T` rows, `L` layers, `D` hidden width, `V` value width; of keys and values that a model attends to, `L`
attention layers, `N` rows, `H` key/value heads, `d` head width.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from raymem.errors import Corrupt, FingerprintMismatch, InvalidTrace, NonFinite
from raymem.inputs import COUNT_END, TIME_END, check_hidden, label, moment, named, numbers, shown, text, whole
from raymem.tensors import dtype_name, to_bits
from raymem.types import Fingerprint

_LAYERS = b"raymem.layers"
_HIDDEN_TYPES: dict[torch.dtype, pa.DataType] = {
    # arrow has no bfloat16
    torch.bfloat16: pa.uint16(),
    torch.float16: pa.float16(),
    torch.float32: pa.float32(),
}
_HIDDEN_DTYPES = {arrow: dtype for dtype, arrow in _HIDDEN_TYPES.items()}


_TOKEN_IDS = 2**31
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Trace:
    """What one forward pass leaves behind.

    `hidden` is [T, L, D] in the fingerprint's dtype, `tokens` the input ids [T] int64, `seq` the run's index of the
    first row, `values` optional float vectors [T, V] in the output-embedding space, `time` seconds since the epoch.
    `fingerprint` says what made the rows: a bank of another model or other layers then refuses them. Without one, shape
    and dtype are all that can be checked.
    """

    hidden: Tensor
    tokens: Tensor
    stream: str
    run: str
    seq: int = 0
    values: Tensor | None = None
    time: float = field(default_factory=time.time)
    fingerprint: Fingerprint | None = None

    def __len__(self) -> int:
        return int(self.hidden.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors carried."""
        extra = 0 if self.values is None else self.values.nbytes
        return int(self.hidden.nbytes + self.tokens.nbytes + extra)

    def checked(self, dtype: torch.dtype) -> Trace:
        """The same as banks take it: names in NFC, times as seconds, tensors dense, detached and on the CPU.

        Arrays and lists become tensors, floats of them in `dtype`, tokens int64; vectors become float32. Whether they
        fit a bank is for `validate`.

        Raises:
            InvalidTrace, InvalidName, TooLarge: with the field and the offending value.
        """
        hidden = numbers("hidden states", self.hidden, dtype)
        if hidden.dim() != 3:
            raise InvalidTrace(f"hidden states are {list(hidden.shape)}; give [rows, layers, width]")
        if not isinstance(self.fingerprint, Fingerprint | None):
            raise InvalidTrace(f"fingerprint is {shown(self.fingerprint)}; give a raymem.Fingerprint, or leave it out")
        values = None if self.values is None else numbers("values", self.values, torch.float32)
        return replace(
            self,
            hidden=hidden,
            tokens=numbers("tokens", self.tokens, torch.int64),
            stream=named("stream", label, self.stream),
            run=named("run", label, self.run),
            seq=named("seq", whole, self.seq, 0, COUNT_END - len(hidden), InvalidTrace),
            values=values.to(torch.float32) if values is not None and values.is_floating_point() else values,
            time=named("time", moment, self.time, InvalidTrace),
        )

    def validate(self, fingerprint: Fingerprint) -> None:
        """Check everything against a bank's fingerprint: what made the rows, shapes, dtype, names, numbers, finiteness.

        Raises:
            InvalidTrace, NonFinite, InvalidName: with the offending value; nothing has been changed.
            FingerprintMismatch: another model made the rows, or they are of other layers.
        """
        for what, tensor in (("hidden", self.hidden), ("tokens", self.tokens), ("values", self.values)):
            if not isinstance(tensor, Tensor) and not (what == "values" and tensor is None):
                raise InvalidTrace(f"{what} is {shown(tensor)}; give a tensor")
        rows = len(self.checked(self.hidden.dtype).hidden)
        if self.fingerprint is not None:
            fingerprint.accept(self.fingerprint)
        check_hidden(self.hidden, fingerprint)
        if self.tokens.shape != (rows,) or self.tokens.dtype != torch.int64:
            found = f"{self.tokens.dtype} {list(self.tokens.shape)}"
            raise InvalidTrace(f"tokens are {found}; expected torch.int64 [{rows}], one id a row")
        if rows and not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < _TOKEN_IDS:
            wrong = min(int(self.tokens.min()), 0) or int(self.tokens.max())
            raise InvalidTrace(f"token id {wrong} is not in 0 … {_TOKEN_IDS - 1}")
        if self.values is None:
            if fingerprint.values:
                raise InvalidTrace("this bank's rows carry vectors (its fingerprint names a value space): send values")
            return
        if not fingerprint.values:
            raise InvalidTrace("this bank's fingerprint names no value space: leave values out, or create it with one")
        expected = (rows, fingerprint.width)
        if self.values.shape != expected or not self.values.is_floating_point():
            raise InvalidTrace(
                f"values are {self.values.dtype} {list(self.values.shape)}; expected floats {list(expected)}"
            )
        if rows and not torch.stack(torch.aminmax(self.values)).isfinite().all():
            raise NonFinite("values hold NaN or Inf; the trace was refused whole")


@dataclass(frozen=True)
class JournalRows:
    """Consecutive accepted rows of one bank, written under one epoch; its tensors are never changed.

    `pos_T` and `seq_T` int64, `streams` and `runs` one name a row, `token_T` int64, `hidden_TLD` in the bank's dtype,
    `value_TV` float32 or None, `time_T` float64 seconds since the epoch (see `sound_times`), `crc_T` int64 (a uint32
    checksum of the row's identity and content, the same wherever and whenever the row is written).
    """

    pos_T: Tensor
    epoch: int
    streams: list[str]
    runs: list[str]
    seq_T: Tensor
    token_T: Tensor
    hidden_TLD: Tensor
    value_TV: Tensor | None
    time_T: Tensor
    crc_T: Tensor

    def __len__(self) -> int:
        return int(self.pos_T.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that make a row large."""
        return int(self.hidden_TLD.nbytes + (0 if self.value_TV is None else self.value_TV.nbytes))

    @classmethod
    def of(cls, trace: Trace, pos: int, epoch: int) -> JournalRows:
        """Number a trace's rows from `pos` and checksum each."""
        rows = len(trace)
        seq_T = torch.arange(trace.seq, trace.seq + rows, dtype=torch.int64)
        token_T = trace.tokens.detach().cpu().contiguous()
        hidden_TLD = trace.hidden.detach().cpu().contiguous()
        value_TV = None if trace.values is None else trace.values.detach().to("cpu", torch.float32).contiguous()
        streams, runs = [trace.stream] * rows, [trace.run] * rows
        return cls(
            pos_T=torch.arange(pos, pos + rows, dtype=torch.int64),
            epoch=epoch,
            streams=streams,
            runs=runs,
            seq_T=seq_T,
            token_T=token_T,
            hidden_TLD=hidden_TLD,
            value_TV=value_TV,
            time_T=torch.full((rows,), trace.time, dtype=torch.float64),
            crc_T=checksums(streams, runs, seq_T, token_T, hidden_TLD, value_TV),
        )

    def part(self, start: int, stop: int | None = None) -> JournalRows:
        """Rows by index, from `start` to `stop` (exclusive); nothing is copied."""
        if start <= 0 and (stop is None or stop >= len(self)):
            return self
        piece = slice(start, stop)
        return self._picked(piece, self.streams[piece], self.runs[piece])

    def pieces(self, nbytes: int) -> Iterator[JournalRows]:
        """The rows in order, in parts of about so many bytes; nothing is copied."""
        rows = max(1, nbytes * len(self) // max(1, self.nbytes))
        for start in range(0, len(self), rows):
            yield self.part(start, start + rows)

    def since(self, pos: int) -> JournalRows:
        """The rows from position `pos` on."""
        return self.part(int((self.pos_T < pos).sum()))

    def until(self, pos: int | None) -> JournalRows:
        """The rows before position `pos`, or all."""
        return self if pos is None else self.part(0, int((self.pos_T < pos).sum()))

    def pick(self, index: Sequence[int]) -> JournalRows:
        """The rows of these indices."""
        streams, runs = [self.streams[row] for row in index], [self.runs[row] for row in index]
        return self._picked(torch.tensor(index, dtype=torch.int64), streams, runs)

    def _picked(self, which: slice | Tensor, streams: list[str], runs: list[str]) -> JournalRows:
        return dataclasses.replace(
            self,
            pos_T=self.pos_T[which],
            streams=streams,
            runs=runs,
            seq_T=self.seq_T[which],
            token_T=self.token_T[which],
            hidden_TLD=self.hidden_TLD[which],
            value_TV=None if self.value_TV is None else self.value_TV[which],
            time_T=self.time_T[which],
            crc_T=self.crc_T[which],
        )

    def traces(self) -> list[Trace]:
        """The rows as traces, each of one run, one time and consecutive seq."""
        jumps_T = (self.seq_T.diff() != 1) | (self.time_T.diff() != 0)
        names = list(zip(self.streams, self.runs, strict=True))
        cuts = [row + 1 for row, jump in enumerate(jumps_T.tolist()) if jump or names[row] != names[row + 1]]
        return [self._trace(*bounds) for bounds in itertools.pairwise([0, *cuts, len(self)])]

    def _trace(self, start: int, stop: int) -> Trace:
        return Trace(
            hidden=self.hidden_TLD[start:stop],
            tokens=self.token_T[start:stop],
            stream=self.streams[start],
            run=self.runs[start],
            seq=int(self.seq_T[start]),
            values=None if self.value_TV is None else self.value_TV[start:stop],
            time=float(self.time_T[start]),
        )

    def verify(self) -> JournalRows:
        """Return these rows if every checksum holds.

        Raises:
            Corrupt: naming the first bad position.
        """
        found_T = checksums(self.streams, self.runs, self.seq_T, self.token_T, self.hidden_TLD, self.value_TV)
        bad_T = (found_T != self.crc_T).nonzero().flatten()
        if len(bad_T):
            pos = int(self.pos_T[bad_T[0]])
            raise Corrupt(
                f"row at position {pos} does not match its checksum ({len(bad_T)} such rows in this batch); "
                "restore the bank from an export or a copy of the store",
                pos=pos,
            )
        return self

    def to_arrow(self) -> pa.Table:
        """The rows as one Arrow table of `journal_schema`; tensors are not copied."""
        rows, layers, width = self.hidden_TLD.shape
        schema = journal_schema(self.hidden_TLD.dtype, layers, width)
        value = pa.nulls(rows, schema.field("value").type) if self.value_TV is None else _lists(self.value_TV)
        columns = {
            "pos": self.pos_T.numpy(),
            "epoch": np.full(rows, self.epoch, dtype=np.int64),
            "stream": self.streams,
            "run": self.runs,
            "seq": self.seq_T.numpy(),
            "token": self.token_T.numpy(),
            "hidden": _fixed(self.hidden_TLD.flatten(1), schema.field("hidden").type),
            "value": value,
            "time": self.time_T.numpy(),
            "crc32c": self.crc_T.numpy().astype(np.uint32),
        }
        return pa.table(columns, schema=schema)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> list[JournalRows]:
        """The rows of a table of `journal_schema`, cut wherever the epoch or the width of the values changes."""
        table = table.combine_chunks()
        return [cls._from_piece(table.slice(start, stop - start)) for start, stop in _pieces(table)]

    @classmethod
    def _from_piece(cls, table: pa.Table) -> JournalRows:
        value = _array(table, "value")
        return cls(
            pos_T=_tensor(table, "pos"),
            epoch=table["epoch"][0].as_py(),
            streams=table["stream"].to_pylist(),
            runs=table["run"].to_pylist(),
            seq_T=_tensor(table, "seq"),
            token_T=_tensor(table, "token"),
            hidden_TLD=_hidden(table),
            value_TV=None if value.null_count else from_dlpack(value.flatten()).reshape(len(table), -1),
            time_T=sound_times(_tensor(table, "time")),
            crc_T=_tensor(table, "crc32c").to(torch.int64),
        )


def concat(parts: Sequence[JournalRows]) -> JournalRows:
    """Consecutive parts as one, under the epoch of the first; a bank's fingerprint says whether all carry values."""
    if len(parts) == 1:
        return parts[0]
    cat = torch.cat
    values = [part.value_TV for part in parts if part.value_TV is not None]
    return JournalRows(
        pos_T=cat([part.pos_T for part in parts]),
        epoch=parts[0].epoch,
        streams=[stream for part in parts for stream in part.streams],
        runs=[run for part in parts for run in part.runs],
        seq_T=cat([part.seq_T for part in parts]),
        token_T=cat([part.token_T for part in parts]),
        hidden_TLD=cat([part.hidden_TLD for part in parts]),
        value_TV=cat(values) if values else None,
        time_T=cat([part.time_T for part in parts]),
        crc_T=cat([part.crc_T for part in parts]),
    )


def sound_times(time_T: Tensor) -> Tensor:
    """Times of rows, 0 where earlier versions took one that is none: not a number, before 1970, after the year 9999."""
    sound_T = (time_T >= 0) & (time_T < TIME_END)
    return time_T if bool(sound_T.all()) else torch.where(sound_T, time_T, 0.0)


def journal_schema(dtype: torch.dtype, layers: int, width: int) -> pa.Schema:
    """The journal's Arrow schema for hidden states [rows, layers, width] of `dtype`.

    `hidden` is flat, layer by layer (bfloat16 as its uint16 bits); the number of layers is in the schema's metadata.
    `value` is a list because the width of a bank's values is known only when the first ones come.
    """
    fields = [
        ("pos", pa.int64()),
        ("epoch", pa.int64()),
        ("stream", pa.string()),
        ("run", pa.string()),
        ("seq", pa.int64()),
        ("token", pa.int64()),
        ("hidden", pa.list_(_HIDDEN_TYPES[dtype], layers * width)),
        ("value", pa.list_(pa.float32())),
        ("time", pa.float64()),
        ("crc32c", pa.uint32()),
    ]
    return pa.schema(
        [pa.field(name, kind, nullable=name == "value") for name, kind in fields],
        metadata={_LAYERS: str(layers).encode()},
    )


def is_journal(schema: pa.Schema) -> bool:
    """Whether a schema is that of a journal of some dtype, layers and width; which columns may be null is not asked.

    Raises:
        LookupError, AttributeError, ValueError: it has no `hidden` of fixed lists, or no number of layers.
    """
    hidden, layers = schema.field("hidden").type, int(schema.metadata[_LAYERS])
    if layers < 1 or hidden.list_size < layers or hidden.list_size % layers:
        return False
    wanted = journal_schema(_HIDDEN_DTYPES[hidden.value_type], layers, hidden.list_size // layers)
    return bool(schema.names == wanted.names and schema.types == wanted.types)


def checksums(
    streams: Sequence[str],
    runs: Sequence[str],
    seq_T: Tensor,
    token_T: Tensor,
    hidden_TLD: Tensor,
    value_TV: Tensor | None,
) -> Tensor:
    """crc32c of each row's stream, run, seq, token, hidden bytes and value bytes, as int64 [T]."""
    identity_T2 = np.empty((len(streams), 2), np.int64)
    identity_T2[:, 0], identity_T2[:, 1] = seq_T.numpy(), token_T.numpy()
    parts: list[NDArray[np.uint8]] = [identity_T2.view(np.uint8)]
    for tensor in (hidden_TLD, value_TV):
        if tensor is not None:
            data: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
            parts.append(data.reshape(len(data), data.size // max(1, len(data))))
    bytes_TN = np.concatenate(parts, axis=1)
    seeds: dict[tuple[str, str], int] = {}
    crcs = []
    for stream, run, row in zip(streams, runs, bytes_TN, strict=True):
        if (stream, run) not in seeds:
            seeds[stream, run] = crc32c(f"{stream}\0{run}".encode())
        crcs.append(crc32c(row, seeds[stream, run]))
    return torch.from_numpy(np.array(crcs, dtype=np.int64))


def _pieces(table: pa.Table) -> Iterator[tuple[int, int]]:
    if not len(table):
        return
    epoch = table["epoch"].to_numpy()
    width = _array(table, "value").value_lengths().fill_null(-1).to_numpy()
    cuts = (np.flatnonzero((np.diff(epoch) != 0) | (np.diff(width) != 0)) + 1).tolist()
    yield from zip([0, *cuts], [*cuts, len(table)], strict=True)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    # a slice of a combined table has one chunk, an empty table may have none
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _tensor(table: pa.Table, name: str) -> Tensor:
    return from_dlpack(_whole(name, _array(table, name)))


def _whole(name: str, array: pa.Array) -> pa.Array:
    # torch would try another way, and warn
    if array.null_count:
        raise Corrupt(f"{array.null_count} rows have no {name}; restore the bank from an export or a copy of the store")
    return array


def _hidden(table: pa.Table) -> Tensor:
    array = _array(table, "hidden")
    layers = int(table.schema.metadata[_LAYERS])
    flat = from_dlpack(_whole("hidden", array.flatten()))
    return flat.view(_HIDDEN_DTYPES[array.type.value_type]).reshape(len(table), layers, -1)


def _fixed(tensor_TN: Tensor, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(to_bits(tensor_TN.reshape(-1))), type=kind)


def _lists(tensor_TV: Tensor) -> pa.Array:
    rows, width = tensor_TV.shape
    offsets = np.arange(0, rows * width + 1, width, dtype=np.int32) if width else np.zeros(rows + 1, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tensor_TV.reshape(-1).numpy()))


class RowFormat(NamedTuple):
    """What keys and values of rows are: attention layers, key/value heads, head width, how keys turn, their dtype."""

    layers: int
    heads: int
    width: int
    rope: str
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's keys, values and scales."""
        head = self.width + _SCALE_BYTES if self.dtype == "int8" else self.width * torch.bfloat16.itemsize
        return 2 * self.layers * self.heads * head

    def require(self, other: RowFormat) -> None:
        """Raise FingerprintMismatch naming every field in which `other` differs."""
        mine, theirs = self._asdict(), other._asdict()
        wrong = [name for name in mine if mine[name] != theirs[name]]
        if wrong:
            said = "; ".join(f"{name}: the bank's have {mine[name]!r}, these {theirs[name]!r}" for name in wrong)
            raise FingerprintMismatch(
                f"keys and values of another model, or kept otherwise ({said}); give those of the model and the dtype "
                "that the bank's were made with, or create another bank",
                fields=wrong,
            )


@dataclass(frozen=True)
class AttendedRows:
    """Keys and values of N consecutive rows of one run, for a model to attend to.

    `keys_LNHd` and `values_LNHd` are [attention layers, rows, key/value heads, head width], keys as they are before
    RoPE turns them: floats, or int8 with the float32 scales [L, N, H] by which they are multiplied. `seq` is the run's
    index of the first row. `rope` says how the model turns keys: what `raymem.lm.rebuilding.rope_name` gives.
    """

    stream: str
    run: str
    seq: int
    keys_LNHd: Tensor
    values_LNHd: Tensor
    key_scales_LNH: Tensor | None = None
    value_scales_LNH: Tensor | None = None
    rope: str = ""

    def __len__(self) -> int:
        return int(self.keys_LNHd.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors carried."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def format(self) -> RowFormat:
        """What they are."""
        layers, _, heads, width = self.keys_LNHd.shape
        return RowFormat(layers, heads, width, self.rope, dtype_name(self.keys_LNHd.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their names without a shape."""
        every = {
            "keys": self.keys_LNHd,
            "values": self.values_LNHd,
            "key_scales": self.key_scales_LNH,
            "value_scales": self.value_scales_LNH,
        }
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def checked(self, *, int8: bool = True) -> AttendedRows:
        """The same as banks keep it: names in NFC, tensors on the CPU, floats rounded to int8 or to bfloat16.

        Raises:
            InvalidTrace, InvalidName, NonFinite, TooLarge: naming the field and the value.
        """
        given = {"keys": self.keys_LNHd, "values": self.values_LNHd} | self.tensors()
        dense = {name: numbers(name, tensor, torch.float32) for name, tensor in given.items()}
        shape, dtype = dense["keys"].shape, dense["keys"].dtype
        if len(shape) != 4 or 0 in (shape[0], shape[2], shape[3]):
            raise InvalidTrace(f"keys are {list(shape)}; give [attention layers, rows, key/value heads, head width]")
        if dense["values"].shape != shape or dense["values"].dtype != dtype:
            found = f"{dense['values'].dtype} {list(dense['values'].shape)}"
            raise InvalidTrace(f"values are {found}, and keys {dtype} {list(shape)}; give both alike")
        if dtype != torch.int8 and not dtype.is_floating_point:
            raise InvalidTrace(f"keys are {dtype}; give floats, or int8 with their scales")
        wanted = {"keys", "values"} | ({"key_scales", "value_scales"} if dtype == torch.int8 else set())
        if dense.keys() != wanted:
            raise InvalidTrace(f"keys are {dtype}, which come with {sorted(wanted)}; these have {sorted(dense)}")
        for name in wanted - {"keys", "values"}:
            if dense[name].shape != shape[:3] or dense[name].dtype != torch.float32:
                found = f"{dense[name].dtype} {list(dense[name].shape)}"
                raise InvalidTrace(f"{name} are {found}; expected float32 {list(shape[:3])}, one a layer, row and head")
        for name, tensor in dense.items():
            if (
                tensor.is_floating_point()
                and tensor.numel()
                and not torch.stack(torch.aminmax(tensor)).isfinite().all()
            ):
                raise NonFinite(f"{name} hold NaN or Inf; the rows were refused whole")
        if dtype != torch.int8:
            dense = _rounded(dense, int8=int8)
        return AttendedRows(
            stream=named("stream", label, self.stream),
            run=named("run", label, self.run),
            seq=named("seq", whole, self.seq, 0, COUNT_END - shape[1], InvalidTrace),
            keys_LNHd=dense["keys"],
            values_LNHd=dense["values"],
            key_scales_LNH=dense.get("key_scales"),
            value_scales_LNH=dense.get("value_scales"),
            rope=named("rope", _rope, self.rope),
        )


def _rope(value: object) -> str:
    if not (found := text(value, InvalidTrace)):
        raise InvalidTrace(f"{shown(value)}; say how the model turns keys, as raymem.lm.rebuilding.rope_name does")
    return found


def quantize_rows(rows_LNHd: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values in int8 and their scales `[L, N, H]` (float32), one a row and head.

    An element is at most half a scale away from what it was, a scale being the head's largest element over 127.
    """
    scales_LNH = rows_LNHd.abs().amax(-1).float() / 127
    steps_LNHd = rows_LNHd.float() / scales_LNH.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return steps_LNHd.round_().clamp_(-127, 127).to(torch.int8), scales_LNH


def _rounded(dense: dict[str, Tensor], *, int8: bool) -> dict[str, Tensor]:
    if not int8:
        return {name: tensor.to(torch.bfloat16) for name, tensor in dense.items()}
    (keys, key_scales), (values, value_scales) = quantize_rows(dense["keys"]), quantize_rows(dense["values"])
    return {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}
