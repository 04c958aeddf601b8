"""Errors on their way out: one shape for all, and the same classes in OpenAPI."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

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
# any route can answer with these
_ALWAYS: tuple[type[RaymemError], ...] = (Unauthorized, InvalidInput, TooLarge, Overloaded, RaymemError, Unavailable)


def respond(error: RaymemError) -> Response:
    """An error as a response: `{"error": {code, message, details}}` with the status of its class."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps({"error": error.to_wire()}, default=str)
    return Response(body, error.http_status, headers, media_type="application/json")


def documented(*errors: type[RaymemError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for a route: its own errors and those that every route has."""
    by_status: dict[int, list[type[RaymemError]]] = {}
    for error in (*errors, *(cls for cls in _ALWAYS if cls not in errors)):
        by_status.setdefault(error.http_status, []).append(error)
    return {
        status: {
            "model": ErrorBody,
            "description": " ".join(f"`{cls.code}`: {(cls.__doc__ or '').splitlines()[0]}" for cls in classes),
        }
        for status, classes in sorted(by_status.items())
    }


def install(app: FastAPI) -> None:
    """Give every error that can leave the app the one shape."""
    app.add_exception_handler(RaymemError, _on_raymem)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)


async def _on_raymem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RaymemError)
    if isinstance(error, StorageError):
        log.error("storage failed", error=error.message)
    return respond(error)


async def _on_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return respond(invalid(list(error.errors())))


def invalid(problems: list[Any]) -> InvalidInput:
    """What pydantic found, as one sentence about the first problem; the others are in the details."""
    told = [{"where": ".".join(str(part) for part in it["loc"]), "problem": it["msg"]} for it in problems]
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return InvalidInput(f"{told[0]['where']}: {told[0]['problem']}{more}", problems=told[:20])


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    carried = getattr(error, "error", None)
    if isinstance(carried, RaymemError):
        return respond(carried)
    if error.status_code == NotFound.http_status:
        return respond(NotFound(f"there is nothing at {request.url.path}; /docs lists what there is"))
    wire = InvalidInput(f"{request.method} {request.url.path}: {error.detail}").to_wire()
    return JSONResponse({"error": wire}, error.status_code, headers=error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("unexpected error", path=request.url.path, error=repr(error))
    return respond(RaymemError(f"the gateway failed on {request.method} {request.url.path}; its log says why"))
