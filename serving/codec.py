"""Bodies in and out: JSON for people, msgpack for tensors, Arrow for rows in bulk; the headers say which."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from torch import Tensor

from raymem.client import routes, wire
from raymem.client.store import AsyncBank
from raymem.errors import InvalidInput, TooLarge
from raymem.serving.errors import explain, unreadable
from raymem.serving.intake import ROWS, check_json, read_aside
from raymem.serving.schemas import ReadAnswer, ReadBody, WriteBody
from raymem.types import Readout, Trace

_MOMENTS = (str, int, float, type(None))
# a trace has three dozen, and as many more as its fingerprint has layers
_MOST_ITEMS = 1024
# a neighbour in JSON costs ten times what a number does: one answer holds the interpreter for half a second at most
_MOST_NEIGHBOURS, _MOST_NUMBERS = 2**16, 2**20

M = TypeVar("M", bound=BaseModel)


class ReadQuery(NamedTuple):
    """What a read asks."""

    hidden_QLD: Tensor
    k: int
    start: int
    as_of: str | float | None
    allow_partial: bool


async def read_traces(request: Request, bank: AsyncBank, max_bytes: int) -> list[Trace]:
    """The traces in a body: one of JSON or msgpack, any number of Arrow.

    Raises:
        InvalidInput: another content type, or not what it says.
        Corrupt: a message that does not hold together.
    """
    kind = _content_type(request, routes.JSON, routes.MSGPACK, routes.ARROW)
    data = await request.body()
    if kind == routes.ARROW:
        return await read_aside(len(data), wire.traces_from_arrow, data, max_bytes)
    if kind == routes.MSGPACK:
        trace = await read_aside(len(data), wire.unpack, data, max_bytes, _MOST_ITEMS)
        if not isinstance(trace, Trace):
            raise InvalidInput(f"the message holds a {type(trace).__name__}; a write takes a Trace")
        return [trace]
    body = await read_aside(len(data), _parse, WriteBody, data)
    return [await read_aside(len(data), body.trace, (await bank.info()).spec.fingerprint)]


async def read_query(request: Request, bank: AsyncBank, max_bytes: int) -> ReadQuery:
    """The question in a body, JSON or msgpack.

    Raises:
        InvalidInput: another content type, or not what it says.
        TooLarge: see `answer_readout`.
    """
    kind = _content_type(request, routes.JSON, routes.MSGPACK)
    data = await request.body()
    if kind == routes.MSGPACK:
        return _query(await read_aside(len(data), wire.unpack, data, max_bytes, _MOST_ITEMS))
    body = await read_aside(len(data), _parse, ReadBody, data)
    queries = await read_aside(len(data), body.queries, (await bank.info()).spec.fingerprint)
    if not _wants_tensors(request):
        # told before the work is done
        _require_json(len(queries) * body.k, 0)
    return ReadQuery(queries, body.k, body.start, body.as_of, body.allow_partial)


async def answer_readout(request: Request, readout: Readout) -> Response:
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


def _content_type(request: Request, *known: str) -> str:
    given = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if given not in known:
        raise unreadable(given, *known)
    return given


def _parse(model: type[M], data: bytes) -> M:
    check_json(data, ROWS)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise explain(error) from error


def _query(message: object) -> ReadQuery:
    if isinstance(message, dict) and message.keys() - {"as_of", "allow_partial"} == {"hidden", "k", "start"}:
        found = ReadQuery(
            message["hidden"],
            message["k"],
            message["start"],
            message.get("as_of"),
            message.get("allow_partial", False),
        )
        integers = type(found.k) is int and type(found.start) is int and type(found.allow_partial) is bool
        if isinstance(found.hidden_QLD, Tensor) and integers and type(found.as_of) in _MOMENTS:
            return found
    raise InvalidInput(
        "a read takes a map of hidden (tensor), k and start (integers), as_of (a tag or a time) and allow_partial"
    )
