"""Error responses: one shape for all, and the same classes in OpenAPI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from raymem.client import routes
from raymem.errors import (
    InvalidInput,
    NotFound,
    Overloaded,
    RaymemError,
    StorageError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from raymem.logs import get_logger
from raymem.serving.schemas import ErrorBody

log = get_logger("raymem.gateway")
# errors that any route can answer with
_ALWAYS: tuple[type[RaymemError], ...] = (
    *(Unauthorized, InvalidInput, TooLarge, Overloaded, RaymemError, Unavailable, StorageError),
)
# statuses of the server itself, before a route is chosen
NOT_HTTP, TOO_SLOW, HEAD_TOO_LARGE = 400, 408, 431
_SERVER = {
    NOT_HTTP: "`invalid_input`: What came is no HTTP, or its body ended early.",
    TOO_SLOW: "`invalid_input`: The request did not arrive in time.",
    HEAD_TOO_LARGE: "`too_large`: The address and headers are over the limit.",
}
# a name with an encoded slash makes another address
_ELSEWHERE = {405: "`invalid_input`: The method is not one of this address."}
_LONGEST = 200


class Carried(HTTPException):
    """Carries a RaymemError through FastAPI code that lets only HTTP errors pass."""

    def __init__(self, error: RaymemError, status: int | None = None) -> None:
        super().__init__(status or error.http_status, error.message)
        self.error = error


def respond(error: RaymemError, status: int | None = None) -> Response:
    """An error as a response: `{"error": {code, message, details}}` with the status of its class, or another."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(encode({"error": error.to_wire()}), status or error.http_status, headers, media_type=routes.JSON)


def encode(answer: dict[str, Any]) -> bytes:
    """JSON that every parser reads: null for NaN and infinities, text for types that JSON lacks."""
    return pydantic_core.to_json(_clean(answer), inf_nan_mode="null", fallback=str)


def _clean(data: Any) -> Any:
    if isinstance(data, str):
        # an unpaired surrogate can't be encoded
        return data.encode("utf-8", "replace").decode()
    if isinstance(data, bytes):
        return repr(data)
    if isinstance(data, dict):
        return {_clean(str(key)): _clean(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_clean(value) for value in data]
    return data


def documented(*errors: type[RaymemError], elsewhere: bool = False) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for a route: its own errors and those that every route has; `elsewhere` adds 405."""
    by_status: dict[int, list[type[RaymemError]]] = {}
    for error in dict.fromkeys((*errors, *_ALWAYS)):
        by_status.setdefault(error.http_status, []).append(error)
    told = {
        status: " ".join(f"`{cls.code}`: {(cls.__doc__ or '').splitlines()[0]}" for cls in classes)
        for status, classes in by_status.items()
    }
    told |= _SERVER | (_ELSEWHERE if elsewhere else {})
    return {status: {"model": ErrorBody, "description": text} for status, text in sorted(told.items())}


def install(app: FastAPI) -> None:
    """Answer every error of the app in the one shape."""
    app.add_exception_handler(RaymemError, _on_raymem)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def _on_raymem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RaymemError)
    if isinstance(error, StorageError):
        log.error("storage failed", error=error.message)
    return respond(error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    # FastAPI doesn't parse a body without a JSON content type, and then finds no object
    if problems[0]["loc"] == ("body",) and problems[0]["type"] in ("model_attributes_type", "dict_type"):
        given = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if given != routes.JSON:
            return respond(unreadable(given, routes.JSON))
    return respond(invalid(problems))


def unreadable(given: str, *known: str) -> InvalidInput:
    """A body of a content type that a route does not take."""
    return InvalidInput(f"content type {given[:_LONGEST]!r} can't be read here; send {', '.join(known)}")


def explain(error: ValidationError) -> InvalidInput:
    """The error for a body that pydantic refused."""
    return invalid(error.errors(include_url=False, include_context=False, include_input=False))


def invalid(problems: Sequence[Any]) -> InvalidInput:
    """The error for pydantic's problems: the message is the innermost one, the details list the others."""
    told = [
        {
            "where": ".".join(str(part)[:_LONGEST] for part in it["loc"]) or "body",
            # pydantic's prefix for errors of our own validators
            "problem": str(it["msg"]).removeprefix("Value error, ")[:_LONGEST],
        }
        for it in problems[:20]
    ]
    # a value of several allowed shapes fails as each of them; the deepest problem is of the shape that was meant
    depths = [len(it["loc"]) for it in problems[:20]]
    main = told[depths.index(max(depths))]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InvalidInput(f"{main['where']}: {main['problem']}{more}", problems=told)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, Carried):
        return respond(error.error, error.status_code)
    path = request.url.path[:_LONGEST]
    if error.status_code == NotFound.http_status:
        return respond(NotFound(f"there is nothing at {path}; /docs lists what there is"))
    answer = respond(InvalidInput(f"{request.method} {path}: {error.detail}"), error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    # the caller has disconnected, so the answer is only counted
    return respond(InvalidInput("the body ended before its end"), NOT_HTTP)


async def _on_bug(request: Request, error: Exception) -> Response:
    path = request.url.path[:_LONGEST]
    log.error("unexpected error", path=path, error=repr(error)[:2000])
    return respond(RaymemError(f"the gateway failed on {request.method} {path}; its log says why"))
