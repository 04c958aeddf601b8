"""The gateway: memory over HTTP, in front of any store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema

import raymem
from raymem.client.store import AsyncStore
from raymem.config import Settings
from raymem.host.locks import Locks
from raymem.serving import docs, errors
from raymem.serving.auth import DOCS, Auth
from raymem.serving.intake import SLOW_AT_ONCE, Budget, Transfers
from raymem.serving.metrics import Counted, Metrics
from raymem.serving.recall import Reader
from raymem.serving.routes import banks, history, rows, store
from raymem.serving.schemas import ReadBody, WriteBody

Opener = Callable[[], Awaitable[AsyncStore]]
_REF = "#/components/schemas/{model}"


def create_app(store_or_opener: AsyncStore | Opener, settings: Settings | None = None) -> FastAPI:
    """Memory over HTTP.

    Args:
        store_or_opener: an open store, which stays the caller's to close; or a function that opens one when the app
            starts, which the app closes when it stops.
        settings: read from file and environment by default; the section `gateway` is used here.
    """
    settings = settings or Settings.load()
    app = FastAPI(
        title="raymem",
        version=raymem.__version__,
        description='Memory banks of hidden states. Errors are `{"error": {code, message, details}}` everywhere.',
        lifespan=_lifespan(store_or_opener),
        # FastAPI's own pages load scripts from elsewhere, which could then do here what they like
        docs_url=None,
        redoc_url=None,
        # a slash too much is an error, not a second request with its body
        redirect_slashes=False,
    )
    app.state.settings = settings.gateway
    app.state.reader = Reader(settings.gateway.model)
    app.state.metrics = Metrics()
    app.state.budget = Budget(settings.gateway)
    app.state.transfers = Transfers()
    app.state.turns = Locks(lambda: asyncio.Semaphore(SLOW_AT_ONCE))
    # the door checks the key itself, before any body is read; this only tells OpenAPI
    keyed = [Depends(HTTPBearer(auto_error=False, description="One of gateway.api_keys."))]
    for router in (banks.router, history.router, rows.router, store.router):
        app.include_router(router, dependencies=keyed)
    app.include_router(store.probes)
    errors.install(app)
    app.add_middleware(Auth, settings=settings.gateway)
    app.add_middleware(Counted, metrics=app.state.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_route(DOCS, lambda _request: HTMLResponse(docs.page(app.openapi())))
    return app


def _lifespan(store_or_opener: AsyncStore | Opener) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if isinstance(store_or_opener, AsyncStore):
            app.state.store = store_or_opener
            yield
            return
        app.state.store = await store_or_opener()
        try:
            yield
        finally:
            await app.state.store.close()

    return lifespan


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        # bodies that are negotiated by hand are unknown to FastAPI
        _, extra = models_json_schema([(WriteBody, "validation"), (ReadBody, "validation")], ref_template=_REF)
        found["components"]["schemas"] |= extra["$defs"]
        app.openapi_schema = found
    return app.openapi_schema
