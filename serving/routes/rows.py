"""Rows into a bank, readouts and text out of it: JSON for people, msgpack for tensors, Arrow for rows in bulk."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic_core
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ValidationError
from torch import Tensor

from raymem.client import routes, wire
from raymem.client.store import AsyncBank
from raymem.errors import (
    BankDetached,
    BankNotFound,
    FingerprintMismatch,
    InvalidInput,
    InvalidName,
    InvalidTrace,
    MissingExtra,
    ModelNotFound,
    NonFinite,
    SequenceConflict,
    StorageError,
    TagNotFound,
    TooLarge,
)
from raymem.rows import Trace
from raymem.serving.errors import explain, unreadable
from raymem.serving.intake import ROWS, Intake, check_json, read_aside
from raymem.serving.recall import recall
from raymem.serving.routes.common import BankDep, RecallModelDep, SettingsDep, TurnDep, serve
from raymem.serving.schemas import ReadAnswer, ReadBody, RecallAnswer, RecallBody, Tokens, WriteBody
from raymem.types import Ack, Readout

router = APIRouter(tags=["rows"], route_class=Intake)
# a row's number in its run, as the journal keeps it
Seq = Annotated[int, Query(ge=0, lt=2**63)]
MOMENTS = (str, int, float, type(None))
# a trace has three dozen, and as many more as its fingerprint has layers
MOST_ITEMS = 1024
# a neighbour in JSON takes ten times what a number does; one answer blocks the interpreter for at most half a second
_MOST_NEIGHBOURS, _MOST_NUMBERS = 2**16, 2**20

M = TypeVar("M", bound=BaseModel)
_BINARY = {"schema": {"type": "string", "format": "binary"}}


class _ReadQuery(NamedTuple):
    """What a read asks."""

    hidden_QLD: Tensor
    k: int
    start: int
    as_of: str | float | None
    allow_partial: bool


def binary_body(model: type[Any] | None, *others: str) -> dict[str, Any]:
    """For OpenAPI: a body that a route reads itself, JSON of a model, if one is named, or bytes of other types."""
    schema = {} if model is None else {routes.JSON: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": schema | {other: _BINARY for other in others}}}


@serve(
    router,
    routes.WRITE,
    *(BankNotFound, BankDetached, FingerprintMismatch, SequenceConflict, InvalidTrace, NonFinite, StorageError),
    openapi_extra=binary_body(WriteBody, routes.MSGPACK, routes.ARROW),
)
async def write(bank: BankDep, settings: SettingsDep, request: Request, durable: bool = True) -> Ack:
    """Write a trace (JSON, msgpack) or many (an Arrow stream); durable when answered, unless `durable=false`.

    Of an Arrow stream the traces are written in order; when one is refused, those before it stay written, and sending
    the stream again writes no row twice.
    """
    traces = await _read_traces(request, bank, settings.max_body_bytes)
    acks = [await bank.write(trace, durable=durable) for trace in traces]
    return Ack(
        rows=sum(ack.rows for ack in acks),
        duplicates=sum(ack.duplicates for ack in acks),
        end=max((ack.end for ack in acks), default=-1),
        gaps=sum(ack.gaps for ack in acks),
        durable=all(ack.durable for ack in acks),
    )


@serve(
    router,
    routes.READ,
    *(BankNotFound, BankDetached, FingerprintMismatch, InvalidTrace, NonFinite, TagNotFound),
    response_model=ReadAnswer,
    openapi_extra=binary_body(ReadBody, routes.MSGPACK),
)
async def read(bank: BankDep, settings: SettingsDep, request: Request) -> Response:
    """Read with consecutive hidden states of one context, `as_of` a tag or time what the bank was then.

    `Accept: application/msgpack` answers in tensors.
    """
    query = await _read_query(request, bank, settings.max_body_bytes)
    readout = await bank.read(
        query.hidden_QLD, query.k, start=query.start, as_of=query.as_of, allow_partial=query.allow_partial
    )
    return await _answer_readout(request, readout)


@serve(router, routes.RECALL, BankNotFound, BankDetached, FingerprintMismatch, MissingExtra, ModelNotFound, InvalidName)
async def recall_text(bank: BankDep, model: RecallModelDep, turn: TurnDep, body: RecallBody) -> RecallAnswer:
    """Ask a bank in text: the text runs through the bank's model, the answer is text that was written there."""
    async with turn:
        return await recall(bank, model, body.text, body.k, body.as_of, body.allow_partial)


@serve(router, routes.TOKENS, BankNotFound, InvalidName, response_model=Tokens)
async def tokens(
    bank: BankDep,
    turn: TurnDep,
    stream: str,
    run: str,
    seq_from: Seq,
    seq_to: Seq,
) -> Response:
    """List the token ids of a run's rows from `seq_from` to `seq_to` (exclusive), in order."""
    async with turn:
        found = await bank.tokens(stream, run, seq_from, seq_to)
    # FastAPI would check each token by itself while other callers wait
    body = await read_aside(8 * len(found), lambda: pydantic_core.to_json({"tokens": found.tolist()}))
    return Response(body, media_type=routes.JSON)


async def _read_traces(request: Request, bank: AsyncBank, max_bytes: int) -> list[Trace]:
    """The traces in a body: one of JSON or msgpack, any number of Arrow.

    Raises:
        InvalidInput: another content type, or a body that is not of it.
        Corrupt: a checksum or length in the message that does not hold.
    """
    kind = content_type(request, routes.JSON, routes.MSGPACK, routes.ARROW)
    data = await request.body()
    if kind == routes.ARROW:
        return await read_aside(len(data), wire.traces_from_arrow, data, max_bytes)
    if kind == routes.MSGPACK:
        trace = await read_aside(len(data), wire.unpack, data, max_bytes, MOST_ITEMS)
        if not isinstance(trace, Trace):
            raise InvalidInput(f"the message holds a {type(trace).__name__}; a write takes a Trace")
        return [trace]
    body = await read_aside(len(data), parse_body, WriteBody, data)
    return [await read_aside(len(data), body.trace, (await bank.info()).spec.fingerprint)]


async def _read_query(request: Request, bank: AsyncBank, max_bytes: int) -> _ReadQuery:
    """The question in a body, JSON or msgpack.

    Raises:
        InvalidInput: another content type, or a body that is not of it.
        TooLarge: see `_answer_readout`.
    """
    kind = content_type(request, routes.JSON, routes.MSGPACK)
    data = await request.body()
    if kind == routes.MSGPACK:
        return _query(await read_aside(len(data), wire.unpack, data, max_bytes, MOST_ITEMS))
    body = await read_aside(len(data), parse_body, ReadBody, data)
    queries = await read_aside(len(data), body.queries, (await bank.info()).spec.fingerprint)
    if not _wants_tensors(request):
        # refused before the work is done
        _require_json(len(queries) * body.k, 0)
    return _ReadQuery(queries, body.k, body.start, body.as_of, body.allow_partial)


async def _answer_readout(request: Request, readout: Readout) -> Response:
    """A readout as the client wants it: tensors if it accepts msgpack, else JSON.

    Raises:
        TooLarge: JSON of so many neighbours and numbers is not written.
    """
    found = 0 if readout.tokens_Qk is None else readout.tokens_Qk.numel()
    size = found + readout.values_QV.numel()
    if _wants_tensors(request):
        return Response(await read_aside(4 * size, wire.pack, readout), media_type=routes.MSGPACK)
    _require_json(found, size)
    body = await read_aside(64 * size, lambda: ReadAnswer.of(readout).model_dump_json())
    return Response(body, media_type=routes.JSON)


def _wants_tensors(request: Request) -> bool:
    return routes.MSGPACK in request.headers.get("accept", "")


def _require_json(neighbours: int, size: int) -> None:
    if neighbours > _MOST_NEIGHBOURS or size > _MOST_NUMBERS:
        raise TooLarge(
            f"an answer of {neighbours} neighbours and {size - neighbours} numbers is not written as JSON (at most "
            f"{_MOST_NEIGHBOURS}, {_MOST_NUMBERS}): send `Accept: {routes.MSGPACK}`, or ask for less"
        )


def content_type(request: Request, *known: str) -> str:
    """The type of a request's body, one of those known.

    Raises:
        InvalidInput: another.
    """
    given = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if given not in known:
        raise unreadable(given, *known)
    return given


def parse_body(model: type[M], data: bytes) -> M:
    """A body of JSON with tensors in it.

    Raises:
        InvalidInput, TooLarge: it is none of the model, or too complex.
    """
    check_json(data, ROWS)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise explain(error) from error


def _query(message: object) -> _ReadQuery:
    if isinstance(message, dict) and message.keys() - {"as_of", "allow_partial"} == {"hidden", "k", "start"}:
        found = _ReadQuery(
            message["hidden"],
            message["k"],
            message["start"],
            message.get("as_of"),
            message.get("allow_partial", False),
        )
        integers = type(found.k) is int and type(found.start) is int and type(found.allow_partial) is bool
        if isinstance(found.hidden_QLD, Tensor) and integers and type(found.as_of) in MOMENTS:
            return found
    raise InvalidInput(
        "a read takes a map of hidden (tensor), k and start (integers), as_of (a tag or a time) and allow_partial"
    )
