"""The gateway's JSON bodies, for people and for OpenAPI.

Shape legend: `T` rows, `L` layers, `D` hidden width, `V` value width, `Q` queries, `k` neighbours.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, Strict
from torch import Tensor

from raymem.errors import InvalidTrace
from raymem.inputs import (
    AsOf,
    BankName,
    BankNames,
    Count,
    Flag,
    Label,
    Lifetime,
    Moment,
    Neighbours,
    Partitions,
    Place,
)
from raymem.rows import Trace
from raymem.tensors import from_bytes
from raymem.types import DTYPES, AttendQuery, BankSpec, ChoiceMethod, Fingerprint, MemoryTokens, Readout

Token = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Number = Annotated[float, Strict()]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(BaseModel):
    """What went wrong: a stable code, a sentence with the value and the fix, and data for programs."""

    code: str
    message: str
    details: dict[str, Any] = {}


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class PackedTensor(_Request):
    """A tensor as base64 of its little-endian bytes, row by row."""

    dtype: Literal["bfloat16", "float16", "float32"]
    shape: list[Annotated[int, Strict(), Field(ge=0, lt=2**48)]] = Field(max_length=4)
    base64: str

    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            InvalidTrace: not base64, or the bytes don't fill the shape.
        """
        try:
            data = bytearray(base64.b64decode(self.base64, validate=True))
        except binascii.Error as error:
            raise InvalidTrace(f"a tensor's base64 is broken: {error}") from error
        return from_bytes(data, self.dtype, self.shape, InvalidTrace)


# stops at the first wrong number of a body
_Row = Annotated[list[Number], Field(fail_fast=True)]
_Rows = Annotated[list[_Row], Field(fail_fast=True)]
Floats3 = PackedTensor | Annotated[list[_Rows], Field(fail_fast=True)]
Floats2 = PackedTensor | _Rows


class Create(_Request):
    """A new bank."""

    name: BankName = Field(examples=["research/alice"])
    spec: BankSpec
    partitions: Partitions = Field(default=1, description="Over so many shards its rows are spread, a stream in one.")


class WriteBody(_Request):
    """A trace: hidden states [T, L, D] in the bank's dtype (nested lists are cast to it) and the input tokens [T]."""

    stream: Label
    run: Label
    seq: Count = 0
    tokens: Annotated[list[Token], Field(fail_fast=True)]
    hidden: Floats3
    values: Floats2 | None = None
    time: Moment | None = None
    fingerprint: Fingerprint | None = Field(
        default=None, description="What made the rows: a bank of another model or other layers then refuses them."
    )

    def trace(self, fingerprint: Fingerprint) -> Trace:
        """The trace as the bank wants it."""
        given = {} if self.time is None else {"time": self.time}
        return Trace(
            hidden=_hidden(self.hidden, fingerprint),
            tokens=torch.tensor(self.tokens, dtype=torch.int64),
            stream=self.stream,
            run=self.run,
            seq=self.seq,
            values=None if self.values is None else _floats(self.values, torch.float32),
            fingerprint=self.fingerprint,
            **given,
        )


class ReadBody(_Request):
    """Q consecutive hidden states [Q, L, D] of one context, the first of which stood at position `start`.

    `as_of` reads what the bank was at a tag or a time (seconds since 1970, or ISO 8601).
    """

    hidden: Floats3
    k: Neighbours = 32
    start: Count = 1
    as_of: AsOf = None
    allow_partial: Flag = Field(default=False, description="Go without partitions that don't answer in time.")
    fingerprint: Fingerprint | None = Field(
        default=None, description="What made the states: a bank of another model or other layers then refuses them."
    )

    def queries(self, fingerprint: Fingerprint) -> Tensor:
        """The states as the bank wants them.

        Raises:
            FingerprintMismatch: another model made them, or they are of other layers.
        """
        if self.fingerprint is not None:
            fingerprint.accept(self.fingerprint)
        return _hidden(self.hidden, fingerprint)


class Neighbour(BaseModel):
    """A candidate next token; where the kind holds rows, with the row that it came from."""

    token: int
    score: float
    stream: str | None = None
    run: str | None = None
    seq: int | None = None
    pos: int | None = None
    partition: int | None = None


class ReadAnswer(BaseModel):
    """A readout: for each query its relevance, its blended vector (may be empty) and its neighbours, best first.

    `missing` are the partitions that did not answer, where that was allowed.
    """

    relevance: list[float]
    values: list[list[float]]
    neighbours: list[list[Neighbour]]
    partial: bool = False
    missing: list[int] = []

    @classmethod
    def of(cls, readout: Readout) -> ReadAnswer:
        """A readout for people."""
        queries = range(len(readout.relevance_Q))
        return cls(
            relevance=readout.relevance_Q.tolist(),
            values=readout.values_QV.float().tolist(),
            neighbours=[_neighbours(readout, query) for query in queries],
            partial=readout.partial,
            missing=list(readout.missing),
        )


class AttendBody(_Request):
    """What rows to attend to are chosen by: hidden states [Q, L, D] of a text's last tokens, its token ids, or both.

    `as_of` chooses among what the bank was at a tag or a time.
    """

    hidden: Floats3 | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)] | None = None
    rows: Count = 512
    layer: Count | None = None
    method: ChoiceMethod = "fused"
    as_of: AsOf = None

    def query(self, fingerprint: Fingerprint) -> AttendQuery:
        """What a bank is asked."""
        hidden = None if self.hidden is None else _hidden(self.hidden, fingerprint)
        tokens = None if self.tokens is None else torch.tensor(self.tokens, dtype=torch.int64)
        return AttendQuery(hidden, tokens, self.rows, self.layer, self.method)


class AttendedRow(BaseModel):
    """A row to attend to: its token, who wrote it, its place in the journal (-1: a mechanism made it of several)."""

    token: int
    stream: str
    run: str
    seq: int
    pos: int
    partition: int | None = None


class AttendAnswer(BaseModel):
    """The rows that were chosen, in the order of their slots, and the relevance of the best match."""

    relevance: float
    rows: list[AttendedRow]

    @classmethod
    def of(cls, memory: MemoryTokens) -> AttendAnswer:
        """Rows for people."""
        parts = [None] * len(memory) if memory.partition_N is None else memory.partition_N.tolist()
        columns = (memory.tokens_N, memory.source_N, memory.seq_N, memory.pos_N)
        found = zip(*(column.tolist() for column in columns), parts, strict=True)
        return cls(
            relevance=memory.relevance,
            rows=[
                AttendedRow(token=token, stream=stream, run=run, seq=seq, pos=pos, partition=part)
                for token, source, seq, pos, part in found
                for stream, run in [memory.sources[source]]
            ],
        )


class Attach(_Request):
    """Where to; wherever there is room when left out."""

    node: Label | None = None


class Migrate(_Request):
    """The node to move to, and the one partition to move, if not all."""

    to: Label
    partition: Count | None = None


class Grow(_Request):
    """How many partitions there are to be."""

    partitions: Partitions


class Erase(_Request):
    """Which rows to erase: those for which all that is given holds; and whether to replay the state without them."""

    stream: Label | None = None
    run: Label | None = None
    seq_from: Count | None = None
    seq_to: Count | None = None
    before: Moment | None = Field(default=None, description="Seconds since the epoch.")
    scope: Literal["rows", "run"] = Field(
        default="rows", description="`run`: also what followed in the same runs, computed with these rows in context."
    )
    rebuild: Flag = False


class Ttl(_Request):
    """How many seconds rows may live; null: for good."""

    ttl_s: Lifetime


class Tag(_Request):
    """A name for the journal's present position."""

    tag: Label


class Tags(BaseModel):
    """All tags of a bank with their positions."""

    tags: dict[str, int]


class Restore(_Request):
    """Where to go back to: a tag or a position."""

    at: Place


class Fork(_Request):
    """The new bank, and the tag or position up to which it has the other's rows; the present one when left out."""

    target: BankName = Field(examples=["research/bob"])
    at: Place | None = None


class Merge(_Request):
    """The new bank, the banks it is made of, and how: see `Store.merge`."""

    target: BankName = Field(examples=["team/all"])
    sources: BankNames
    rebuild: Flag = False
    rename: Flag = True


class Digest(BaseModel):
    """sha256 of the bank's whole state."""

    digest: str


class Tokens(BaseModel):
    """Token ids of one run, in order."""

    tokens: list[int]


class ParamsName(BaseModel):
    """The name of weights, `sha256:…`."""

    params: str


class CalibrationHash(BaseModel):
    """The name under which a calibration is kept."""

    hash: str


class Nodes(BaseModel):
    """Where banks can live."""

    nodes: list[str]


class Health(BaseModel):
    """That the gateway answers, and its version."""

    status: Literal["ok", "ready"]
    service: Literal["raymem"] = "raymem"
    version: str


class Pin(_Request):
    """Whether a bank stays in memory when room is needed."""

    pinned: Flag = True


class Drain(_Request):
    """A node to empty, or, with `undo`, one that may take banks again."""

    node: Label
    undo: Flag = False


class RecallBody(_Request):
    """A question in text, how many spans to answer with, and the tag or time to ask the bank of."""

    text: str = Field(min_length=1, max_length=100_000)
    k: Annotated[int, Strict(), Field(ge=1, le=100)] = 5
    as_of: AsOf = None
    allow_partial: Flag = Field(default=False, description="Go without partitions that don't answer in time.")


class Span(BaseModel):
    """A piece of what was written, around the rows that matched.

    `seq_from` to `seq_to` (exclusive) are rows of the run, `positions` the matched rows' places in the bank's journal,
    `score` the best cosine, `relevance` that of the most relevant query which found it.
    """

    text: str
    stream: str
    run: str
    seq_from: int
    seq_to: int
    positions: list[int]
    score: float
    relevance: float


class Candidate(BaseModel):
    """A token that the bank expects next; `score` is the memory's own, the best over the text."""

    token: int
    text: str
    score: float


class RecallAnswer(BaseModel):
    """What a bank remembers about a text.

    Kinds that hold rows answer with `spans`, best first. Kinds that keep a bounded state know no rows
    (`provenance` is false): `spans` is empty, and what they answer is `relevance` and `candidates`. Partitions that did
    not answer in time are `missing`, where that was allowed.
    """

    bank: str
    kind: str
    provenance: bool
    relevance: float
    spans: list[Span]
    candidates: list[Candidate]
    missing: list[int] = []


def _hidden(given: PackedTensor | list[list[list[float]]], fingerprint: Fingerprint) -> Tensor:
    tensor = _floats(given, DTYPES[fingerprint.dtype])
    # an empty list has no shape of its own
    return tensor.reshape(0, len(fingerprint.layers), fingerprint.width) if given == [] else tensor


def _floats(given: PackedTensor | list[Any], dtype: torch.dtype) -> Tensor:
    if isinstance(given, PackedTensor):
        return given.tensor()
    try:
        return torch.tensor(given, dtype=torch.float32).to(dtype)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidTrace(f"nested lists must be of equal lengths and hold numbers: {error}") from error


def _neighbours(readout: Readout, query: int) -> list[Neighbour]:
    if readout.tokens_Qk is None or readout.scores_Qk is None:
        return []
    tokens, scores = readout.tokens_Qk[query].tolist(), readout.scores_Qk[query].tolist()
    # places without a candidate hold token -1 and score -inf, and come last
    found = [(token, score) for token, score in zip(tokens, scores, strict=True) if token >= 0]
    rows = [row._asdict() for row in readout.rows(query)] or [{}] * len(found)
    return [Neighbour(token=token, score=score, **row) for (token, score), row in zip(found, rows, strict=False)]
