"""Rows for models to attend to: chosen by a question, and their keys and values, in tensors, Arrow or JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from raymem.client import attended_arrow, routes, wire
from raymem.client.store import AsyncBank
from raymem.errors import (
    BankDetached,
    BankNotFound,
    FingerprintMismatch,
    InvalidInput,
    InvalidTrace,
    NonFinite,
    StorageError,
    TagNotFound,
    TooLarge,
)
from raymem.rows import AttendedRows
from raymem.serving.intake import Intake, read_aside
from raymem.serving.routes.common import BankDep, SettingsDep, serve
from raymem.serving.routes.rows import MOMENTS, MOST_ITEMS, binary_body, content_type, parse_body
from raymem.serving.schemas import AttendAnswer, AttendBody
from raymem.types import AttendedExtent, AttendQuery, MemoryTokens

router = APIRouter(tags=["rows"], route_class=Intake)


def _to_json(chosen: MemoryTokens) -> str:
    return AttendAnswer.of(chosen).model_dump_json()


_WRITERS: dict[str, Callable[[MemoryTokens], bytes | str]] = {
    routes.MSGPACK: wire.pack,
    routes.ARROW: attended_arrow.memory_to_arrow,
    routes.JSON: _to_json,
}


class _Question(NamedTuple):
    """What rows are chosen by, and of what the bank was when."""

    query: AttendQuery
    as_of: str | float | None


@serve(
    router,
    routes.ATTEND,
    *(BankNotFound, BankDetached, FingerprintMismatch, InvalidTrace, NonFinite, TagNotFound, TooLarge),
    response_model=AttendAnswer,
    openapi_extra=binary_body(AttendBody, routes.MSGPACK),
)
async def attend(bank: BankDep, settings: SettingsDep, request: Request) -> Response:
    """Choose the rows that a model is to attend to, by the hidden states and tokens of the text that it goes on from.

    Keys and values come along where the bank keeps them and `Accept` is `application/msgpack` or Arrow.
    """
    accept = request.headers.get("accept", "")
    kind = next((kind for kind in (routes.MSGPACK, routes.ARROW) if kind in accept), routes.JSON)
    asked, as_of = await _read_question(request, bank, settings.max_body_bytes)
    fetch = asked.fetch and kind != routes.JSON
    chosen = await bank.attend(
        asked.hidden_QLD,
        asked.tokens_Q,
        asked.rows,
        layer=asked.layer,
        method=asked.method,
        as_of=as_of,
        fetch=fetch,
    )
    return Response(await read_aside(chosen.bytes, _WRITERS[kind], chosen), media_type=kind)


@serve(
    router,
    routes.PUT_ROWS,
    *(BankNotFound, BankDetached, FingerprintMismatch, InvalidTrace, NonFinite, StorageError, TooLarge),
    openapi_extra=binary_body(None, routes.MSGPACK, routes.ARROW),
)
async def put_rows(bank: BankDep, settings: SettingsDep, request: Request) -> AttendedExtent:
    """Keep keys and values of rows that were written, int8 with scales or bfloat16: of one run, or of any (Arrow).

    Of an Arrow stream runs are put in order; when one is refused, those before it stay.
    """
    kind, data = content_type(request, routes.MSGPACK, routes.ARROW), await request.body()
    if kind == routes.ARROW:
        given = await read_aside(len(data), attended_arrow.rows_from_arrow, data, settings.max_body_bytes)
    else:
        given = [await read_aside(len(data), wire.unpack, data, settings.max_body_bytes, MOST_ITEMS)]
    kept = AttendedExtent()
    for rows in given:
        if not isinstance(rows, AttendedRows):
            raise InvalidInput(f"the message holds a {type(rows).__name__}; this takes AttendedRows")
        kept = await bank.put_rows(rows, int8=not rows.keys_LNHd.is_floating_point())
    return kept


async def _read_question(request: Request, bank: AsyncBank, max_bytes: int) -> _Question:
    kind, data = content_type(request, routes.JSON, routes.MSGPACK), await request.body()
    if kind == routes.JSON:
        body: AttendBody = await read_aside(len(data), parse_body, AttendBody, data)
        fingerprint = (await bank.info()).spec.fingerprint
        return _Question(await read_aside(len(data), body.query, fingerprint), body.as_of)
    message: Any = await read_aside(len(data), wire.unpack, data, max_bytes, MOST_ITEMS)
    if isinstance(message, dict) and message.keys() <= {"query", "as_of"}:
        query, as_of = message.get("query"), message.get("as_of")
        if isinstance(query, AttendQuery) and type(as_of) in MOMENTS:
            return _Question(query, as_of)
    raise InvalidInput("this takes a map of query (an AttendQuery) and as_of (a tag or a time)")
