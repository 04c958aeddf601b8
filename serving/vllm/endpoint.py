"""vLLM's `vllm.endpoint_plugins` entry point: the `memory` field on vLLM's OpenAI routes, and `/v1/raymem/…`.

The field is taken out of requests that vLLM has parsed, where they enter the handlers of chat and completions: no body
is read twice, and Ray Serve LLM, which calls the handlers without HTTP, is served the same way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from raymem.errors import ConfigError, InvalidInput, RaymemError, Unauthorized, Unsupported
from raymem.serving.vllm import vllm_internals
from raymem.serving.vllm.memory_field import FIELD
from raymem.serving.vllm.params import CONNECTOR, ConnectorConfig
from raymem.serving.vllm.request_memory import RequestMemory, Told

# the handlers that take the field, by their names in vLLM's state, and those that can't
_SERVED = {"openai_serving_chat": "create_chat_completion", "openai_serving_completion": "create_completion"}
_REFUSING = {
    "openai_serving_chat_batch": "create_batch_chat_completion",
    "openai_serving_responses": "create_responses",
    "anthropic_serving_messages": "create_messages",
}
# a caller that is not allowed a bank has no other key to try
_FORBIDDEN = 403
_STATE = "raymem_memory"

Handler = Callable[..., Awaitable[Any]]


class BankBody(BaseModel):
    """The body of `POST /v1/raymem/attach` and `/detach`."""

    model_config = ConfigDict(extra="forbid")

    bank: str


class MemoryEndpoint:
    """What vLLM loads where `VLLM_PLUGINS` names raymem; see vLLM's `EndpointPlugin`."""

    name = "raymem"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add `/v1/raymem/…`."""
        app.include_router(_router())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Let the handlers of vLLM's OpenAI routes take the `memory` field."""
        install(engine_client, state)


def install(engine_client: Any, state: Any) -> None:
    """Let the handlers in vLLM's `state` take the `memory` field; calling it again changes nothing.

    Raises:
        ConfigError: the engine runs without RaymemConnector. Unsupported: this vLLM has other handlers.
    """
    if getattr(state, _STATE, None) is not None:
        return
    memory = _memory_for(engine_client)
    for names, wrap in ((_SERVED, _serving), (_REFUSING, _refusing)):
        for attribute, method in names.items():
            # vLLM leaves None for what the model can't do
            handler = getattr(state, attribute, None)
            if handler is None:
                continue
            plain = getattr(handler, method, None)
            if plain is None:
                raise Unsupported(f"vLLM's {attribute} has no {method}: this vLLM is not one that raymem knows")
            setattr(handler, method, wrap(plain, memory))
    setattr(state, _STATE, memory)


def _memory_for(engine_client: Any) -> RequestMemory:
    vllm_config = engine_client.vllm_config
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        raise ConfigError(
            f"this engine's KV connector is {getattr(transfer, 'kv_connector', None)!r}, and the {FIELD} field is for "
            f"{CONNECTOR}: start it with `raymem vllm serve MODEL`"
        )
    config = ConnectorConfig.parse(transfer.kv_connector_extra_config)
    layers = vllm_internals.streamed_layers(vllm_config)

    async def call(method: str, *args: Any) -> list[Any]:
        return list(await engine_client.collective_rpc(method, args=args))

    return RequestMemory(config, call, functools.partial(vllm_internals.engine_fingerprint, vllm_config, layers))


def _serving(plain: Handler, memory: RequestMemory) -> Handler:
    @functools.wraps(plain)
    async def create(request: Any, raw_request: Any = None) -> Any:
        try:
            told = await memory.prepare(request)
        except RaymemError as error:
            return _refusal(error)
        answer = await plain(request, raw_request)
        return answer if told is None else _tell(answer, told)

    return create


def _refusing(plain: Handler, _memory: RequestMemory) -> Handler:
    @functools.wraps(plain)
    async def create(request: Any, *args: Any, **kwargs: Any) -> Any:
        if FIELD in (request.model_extra or {}):
            return _refusal(
                InvalidInput(f"{FIELD} is taken by /v1/chat/completions and /v1/completions, not by this address")
            )
        return await plain(request, *args, **kwargs)

    return create


def _tell(answer: Any, told: Told) -> Any:
    """Add what memory serves to an answer: to its body, or to the first chunk of a stream."""
    if isinstance(answer, AsyncGenerator):
        return _first_tells(answer, told)
    if not _is_error(answer):
        # vLLM's answers allow further fields, and so do OpenAI's clients
        setattr(answer, FIELD, told)
    return answer


async def _first_tells(chunks: AsyncGenerator[str, None], told: Told) -> AsyncGenerator[str, None]:
    try:
        waiting = True
        async for chunk in chunks:
            if waiting and (body := _body_of(chunk)) is not None:
                waiting = False
                yield f"data: {json.dumps({**body, FIELD: told}, ensure_ascii=False)}\n\n"
            else:
                yield chunk
    finally:
        # vLLM aborts the request when its generator ends
        await chunks.aclose()


def _body_of(chunk: str) -> dict[str, Any] | None:
    text = chunk.removeprefix("data: ").strip()
    body = json.loads(text) if chunk.startswith("data: {") else None
    return body if isinstance(body, dict) and "error" not in body else None


def _is_error(answer: Any) -> bool:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    return isinstance(answer, ErrorResponse)


def _refusal(error: RaymemError) -> Any:
    """An error as vLLM's handlers return it; the routes take the status from it."""
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    status = _FORBIDDEN if isinstance(error, Unauthorized) else error.http_status
    return ErrorResponse(error=ErrorInfo(message=error.message, type=error.code, param=FIELD, code=status))


def _router() -> APIRouter:
    router = APIRouter(prefix="/v1/raymem", tags=["raymem"])

    @router.get("/banks")
    async def banks(request: Request) -> Response:
        """The banks that are attached to this engine: rows, bytes, whether they are live."""
        return await _answer(request, lambda memory: memory.banks())

    @router.get("/stats")
    async def stats(request: Request) -> Response:
        """What was streamed, read and refused since the engine started."""
        return await _answer(request, lambda memory: memory.stats())

    @router.post("/attach")
    async def attach(body: BankBody, request: Request) -> Response:
        """Attach a bank to this engine, where callers may."""
        return await _answer(request, lambda memory: memory.attach(body.bank))

    @router.post("/detach")
    async def detach(body: BankBody, request: Request) -> Response:
        """Detach a bank from this engine and free its memory."""
        return await _answer(request, lambda memory: memory.detach(body.bank))

    return router


async def _answer(request: Request, ask: Callable[[RequestMemory], Awaitable[Any]]) -> Response:
    try:
        return JSONResponse(await ask(getattr(request.app.state, _STATE)))
    except RaymemError as error:
        refusal = _refusal(error)
        return JSONResponse(refusal.model_dump(), refusal.error.code)
