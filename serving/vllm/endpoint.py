"""vLLM's `vllm.endpoint_plugins` entry point: the `memory` field on vLLM's OpenAI routes, and `/v1/raymem/…`.

The field is taken out of requests that vLLM has parsed, where they enter the handlers of chat and completions: no body
is read twice, and Ray Serve LLM, which calls the handlers without HTTP, is served the same way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from raymem.errors import ConfigError, InvalidInput, RaymemError, Unauthorized, Unsupported
from raymem.serving.vllm import vllm_internals
from raymem.serving.vllm.attach import AttachedRows, attach_rows_async, detach_rows_async
from raymem.serving.vllm.memory_field import FIELD
from raymem.serving.vllm.params import CONNECTOR, ConnectorConfig
from raymem.serving.vllm.request_memory import RequestMemory, Told, Use

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
# of vLLM's event streams: text that JSON can't have within a string
_DATA, _USAGE, _END = "data: ", '"choices":[]', "data: [DONE]\n\n"
# where outputs of the engine that belong to the present request are heard
_HEARD: ContextVar[list[Any] | None] = ContextVar("raymem_heard", default=None)

Handler = Callable[..., Awaitable[Any]]


class BankBody(BaseModel):
    """The body of `POST /v1/raymem/detach`."""

    model_config = ConfigDict(extra="forbid")

    bank: str


class AttachBody(BankBody):
    """The body of `POST /v1/raymem/attach`: `use` is what for, all that callers may do with the bank by default."""

    use: Use | None = None


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
    # vLLM adds to these when it loads one
    memory = _memory_for(engine_client, state.openai_serving_models.lora_requests)
    _listen(engine_client)
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


def _memory_for(engine_client: Any, adapters: Collection[str]) -> RequestMemory:
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

    made_by = functools.partial(vllm_internals.engine_fingerprint, vllm_config, layers)
    return RequestMemory(config, call, made_by if layers else None, _EngineRows(engine_client), adapters)


class _EngineRows:
    """The rows of banks in one engine."""

    def __init__(self, engine_client: Any) -> None:
        self._engine = engine_client

    async def attach(self, name: str) -> AttachedRows:
        return await attach_rows_async(self._engine, name)

    async def detach(self, name: str) -> bool:
        return await detach_rows_async(self._engine, name)


def _serving(plain: Handler, memory: RequestMemory) -> Handler:
    @functools.wraps(plain)
    async def create(request: Any, raw_request: Any = None) -> Any:
        try:
            prepared = await memory.prepare(request)
            if prepared is None:
                return await plain(request, raw_request)
            heard: list[Any] = []
            with _hearing(heard):
                answer = await plain(request, raw_request)
            return _tell(answer, functools.partial(memory.conclude, prepared, heard), prepared.told)
        except RaymemError as error:
            return _refusal(error)

    return create


def _refusing(plain: Handler, _memory: RequestMemory) -> Handler:
    @functools.wraps(plain)
    async def create(request: Any, raw_request: Any = None) -> Any:
        given = request.model_extra
        if given is None and raw_request is not None:
            # this parser drops what it doesn't know; the body was parsed already
            given = await raw_request.json()
        transfer = getattr(request, "kv_transfer_params", None) or (given or {}).get("kv_transfer_params")
        asked = FIELD if FIELD in (given or {}) else "kv_transfer_params['raymem']"
        if asked == FIELD or (isinstance(transfer, Mapping) and "raymem" in transfer):
            return _refusal(
                InvalidInput(f"{asked} is taken by /v1/chat/completions and /v1/completions, not by this address")
            )
        return await plain(request, raw_request)

    return create


@contextmanager
def _hearing(heard: list[Any]) -> Iterator[None]:
    token = _HEARD.set(heard)
    try:
        yield
    finally:
        _HEARD.reset(token)


def _listen(engine_client: Any) -> None:
    """Collect what the connector says of a request when it ends: vLLM's streams leave it out."""
    plain = engine_client.generate

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs, heard = plain(*args, **kwargs), _HEARD.get()
        return outputs if heard is None else _heard_of(outputs, heard)

    engine_client.generate = generate


async def _heard_of(outputs: AsyncGenerator[Any, None], heard: list[Any]) -> AsyncGenerator[Any, None]:
    async with aclosing(outputs):
        async for output in outputs:
            if output.kv_transfer_params:
                heard.append(output.kv_transfer_params)
            yield output


def _tell(answer: Any, conclude: Callable[[], Told], told: Told) -> Any:
    """Add what memory serves to an answer: to its body, or to the first chunk of a stream."""
    if isinstance(answer, AsyncGenerator):
        return _telling(answer, conclude, told)
    if not _is_error(answer):
        # vLLM's answers allow further fields, and so do OpenAI's clients
        setattr(answer, FIELD, conclude())
    return answer


async def _telling(
    chunks: AsyncGenerator[str, None], conclude: Callable[[], Told], told: Told
) -> AsyncGenerator[str, None]:
    begun = False
    # vLLM aborts the request when its generator ends
    async with aclosing(chunks):
        async for chunk in chunks:
            # the chunk with the usage has no choices, and comes when the engine has said all
            last = _END in chunk or _USAGE in chunk
            try:
                now = conclude() if last else told
            except RaymemError as error:
                # as vLLM tells errors of a stream that has begun
                yield f"data: {_refusal(error).model_dump_json()}\n\n"
                yield _END
                return
            yield chunk if begun and not last else _with_field(chunk, now)
            begun = True


def _with_field(chunk: str, told: Told) -> str:
    body = json.loads(chunk.removeprefix(_DATA)) if chunk.startswith(_DATA + "{") else {"error": None}
    return chunk if "error" in body else f"{_DATA}{json.dumps({**body, FIELD: told}, ensure_ascii=False)}\n\n"


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
    async def attach(body: AttachBody, request: Request) -> Response:
        """Attach a bank to this engine, where callers may."""
        return await _answer(request, lambda memory: memory.attach(body.bank, body.use))

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
