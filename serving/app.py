"""The gateway: memory over HTTP, in front of any store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from html import escape
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema

import raymem
from raymem.client.store import AsyncStore
from raymem.config import Settings
from raymem.host.ownership import Locks
from raymem.serving import errors
from raymem.serving.auth import DOCS, Auth
from raymem.serving.intake import SLOW_AT_ONCE, Budget, Transfers
from raymem.serving.metrics import Counted, Metrics
from raymem.serving.recall import RecallModel
from raymem.serving.routes import attend, banks, rows, store
from raymem.serving.schemas import AttendBody, ReadBody, WriteBody

Opener = Callable[[], Awaitable[AsyncStore]]
_REF = "#/components/schemas/{model}"
# bodies whose content type a route reads itself
_BODIES = (WriteBody, ReadBody, AttendBody)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace } pre { overflow: auto; background: #8881; padding: .5rem }
details { border-top: 1px solid #8884; padding: .4rem 0 } summary { cursor: pointer } td { padding-right: 1rem }
"""


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
        # FastAPI's own pages load scripts from other origins, which could then call the gateway
        docs_url=None,
        redoc_url=None,
        # an extra slash is an error, not a redirect that sends the body again
        redirect_slashes=False,
    )
    app.state.settings = settings.gateway
    app.state.recall_model = RecallModel(settings.gateway.model)
    app.state.metrics = Metrics()
    app.state.budget = Budget(settings.gateway)
    app.state.transfers = Transfers()
    app.state.turns = Locks(lambda: asyncio.Semaphore(SLOW_AT_ONCE))
    # Auth checks the key, before any body is read; this only describes it in OpenAPI
    keyed = [Depends(HTTPBearer(auto_error=False, description="One of gateway.api_keys."))]
    for router in (banks.router, banks.history, rows.router, attend.router, store.router):
        app.include_router(router, dependencies=keyed)
    app.include_router(store.probes)
    errors.install(app)
    app.add_middleware(Auth, settings=settings.gateway)
    app.add_middleware(Counted, metrics=app.state.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_route(DOCS, lambda _request: HTMLResponse(_page(app.openapi())))
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
        _, extra = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
        found["components"]["schemas"] |= extra["$defs"]
        app.openapi_schema = found
    return app.openapi_schema


def _page(openapi: dict[str, Any]) -> str:
    """The page at /docs: every route, then the shapes of bodies. It runs no script and loads nothing."""
    told = [
        _operation(method, path, it) for path, methods in openapi["paths"].items() for method, it in methods.items()
    ]
    shapes = [
        _details(name, f"<pre>{escape(json.dumps(shape, indent=1))}</pre>", name)
        for name, shape in sorted(openapi["components"]["schemas"].items())
    ]
    head = f"<h1>{escape(openapi['info']['title'])} {escape(openapi['info']['version'])}</h1>"
    about = (
        f"<p>{escape(openapi['info'].get('description', ''))} For programs: <a href='/openapi.json'>OpenAPI</a>.</p>"
    )
    body = "\n".join([head, about, "<h2>Routes</h2>", *told, "<h2>Shapes</h2>", *shapes])
    title = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>raymem</title>"
    return f"<!doctype html><html lang='en'><head>{title}<style>{_STYLE}</style></head><body>{body}</body></html>"


def _operation(method: str, path: str, told: dict[str, Any]) -> str:
    parts = [f"<p>{escape(told['description'])}</p>"]
    if parameters := told.get("parameters"):
        parts.append(_table((it["name"], it["in"], "needed" if it.get("required") else "") for it in parameters))
    for kind, body in told.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body: <code>{escape(kind)}</code> {_shape(body['schema'])}</p>")
    answers = ((status, _plain(answer["description"])) for status, answer in told["responses"].items())
    parts.append(_table(answers))
    return _details(f"{method.upper()} {path}", "".join(parts), "", escape(told["summary"]))


def _details(name: str, inside: str, anchor: str = "", about: str = "") -> str:
    place = f" id='{escape(anchor)}'" if anchor else ""
    return f"<details{place}><summary><code>{escape(name)}</code> {about}</summary>{inside}</details>"


def _shape(schema: dict[str, Any]) -> str:
    name = str(schema.get("$ref", "")).rsplit("/", 1)[-1]
    return f"<a href='#{escape(name)}'>{escape(name)}</a>" if name else ""


def _table(rows: Any) -> str:
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _plain(text: str) -> str:
    return text.replace("`", "")
