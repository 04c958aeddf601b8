"""What goes into a bank and comes out of it: rows, readouts, text."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic_core
from fastapi import APIRouter, Query, Request, Response

from raymem.client import routes
from raymem.errors import (
    BankDetached,
    BankNotFound,
    FingerprintMismatch,
    InvalidName,
    InvalidTrace,
    MissingExtra,
    ModelNotFound,
    NonFinite,
    SequenceConflict,
    StorageError,
    TagNotFound,
)
from raymem.serving.codec import answer_readout, read_query, read_traces
from raymem.serving.intake import Intake, read_aside
from raymem.serving.recall import recall
from raymem.serving.routes.common import BankDep, ReaderDep, SettingsDep, TurnDep, serve
from raymem.serving.schemas import ReadAnswer, ReadBody, RecallAnswer, RecallBody, Tokens, WriteBody
from raymem.types import Ack

router = APIRouter(tags=["rows"], route_class=Intake)
# a row's number in its run, as the journal keeps it
Seq = Annotated[int, Query(ge=0, lt=2**63)]
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _body(model: type[Any], *others: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {routes.JSON: {"schema": schema}, **{other: _BINARY for other in others}}
    return {"requestBody": {"required": True, "content": content}}


@serve(
    router,
    routes.WRITE,
    *(BankNotFound, BankDetached, FingerprintMismatch, SequenceConflict, InvalidTrace, NonFinite, StorageError),
    openapi_extra=_body(WriteBody, routes.MSGPACK, routes.ARROW),
)
async def write(bank: BankDep, settings: SettingsDep, request: Request, durable: bool = True) -> Ack:
    """Write a trace (JSON, msgpack) or many (an Arrow stream); durable when answered, unless `durable=false`.

    Of an Arrow stream the traces are written in order; when one is refused, those before it stay written, and sending
    the stream again writes no row twice.
    """
    traces = await read_traces(request, bank, settings.max_body_bytes)
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
    openapi_extra=_body(ReadBody, routes.MSGPACK),
)
async def read(bank: BankDep, settings: SettingsDep, request: Request) -> Response:
    """Read with consecutive hidden states of one context, `as_of` a tag or time what the bank was then.

    `Accept: application/msgpack` answers in tensors.
    """
    query = await read_query(request, bank, settings.max_body_bytes)
    readout = await bank.read(
        query.hidden_QLD, query.k, start=query.start, as_of=query.as_of, allow_partial=query.allow_partial
    )
    return await answer_readout(request, readout)


@serve(router, routes.RECALL, BankNotFound, BankDetached, FingerprintMismatch, MissingExtra, ModelNotFound, InvalidName)
async def recall_text(bank: BankDep, reader: ReaderDep, turn: TurnDep, body: RecallBody) -> RecallAnswer:
    """Ask a bank in text: the text runs through the bank's model, the answer is text that was written there."""
    async with turn:
        return await recall(bank, reader, body.text, body.k, body.as_of, body.allow_partial)


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
    # FastAPI would look at each token by itself, and everybody else would wait
    body = await read_aside(8 * len(found), lambda: pydantic_core.to_json({"tokens": found.tolist()}))
    return Response(body, media_type=routes.JSON)
