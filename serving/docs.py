"""The page at /docs: what OpenAPI says, as plain HTML. No script runs on it, and nothing comes from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace } pre { overflow: auto; background: #8881; padding: .5rem }
details { border-top: 1px solid #8884; padding: .4rem 0 } summary { cursor: pointer } td { padding-right: 1rem }
"""


def page(openapi: dict[str, Any]) -> str:
    """Every route, with what it takes and answers, then the shapes that bodies have."""
    told = [
        _operation(method, path, it) for path, methods in openapi["paths"].items() for method, it in methods.items()
    ]
    shapes = [_details(name, _code(shape), name) for name, shape in sorted(openapi["components"]["schemas"].items())]
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


def _code(shape: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(shape, indent=1))}</pre>"


def _plain(text: str) -> str:
    return text.replace("`", "")
