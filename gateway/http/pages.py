"""The pages that people look at: an index of a line, and the documentation made of the OpenAPI description.

The documentation is one document without scripts, styles or fonts from elsewhere, so that it shows without a
network, and nothing in it can act."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from html import escape
from typing import Any

from msgspec.json import encode
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ... import __version__

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { margin-top: 2em; border-top: 1px solid #ccc; padding-top: 1em }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .3em 1em .3em 0 }
code { font-family: ui-monospace, monospace }
"""
Schema = Mapping[str, Any]


class Pages:
    """The handlers of /, /docs and /openapi.json. The last two are made once, at the first request and
    on a thread: that takes some 60 ms, and streams would wait for it."""

    def __init__(self, model: str, description: Callable[[], dict[str, Any]]) -> None:
        self._model = model
        self._description = description

    async def index(self, http: Request) -> Response:
        """Returns a line that says what this is."""
        paths = "/v1/chat/completions, /v1/completions, /v1/models, /health"
        text = f"pdserve {__version__} serves {self._model} at {paths}; everything is described at /docs"
        return PlainTextResponse(f"{text}\n", headers={"x-content-type-options": "nosniff"})

    async def docs(self, http: Request) -> Response:
        """Returns the documentation of all paths."""
        _, page = await asyncio.shield(self._documents)
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    async def openapi(self, http: Request) -> Response:
        """Returns the description of all paths for programs."""
        description, _ = await asyncio.shield(self._documents)
        return Response(description, media_type="application/json")

    @cached_property
    def _documents(self) -> asyncio.Future[tuple[bytes, str]]:
        return asyncio.get_running_loop().run_in_executor(None, self._make)

    def _make(self) -> tuple[bytes, str]:
        description = self._description()
        return encode(description), "".join(document(description))


def document(description: Schema) -> Iterator[str]:
    """Yields HTML for an OpenAPI description."""
    schemas = description["components"]["schemas"]
    title = escape(f"{description['info']['title']} {description['info']['version']}")
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{STYLE}</style><h1>{title}</h1>"
    yield "<p>The same as JSON: <a href='/openapi.json'>/openapi.json</a>.</p>"
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            if "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                yield from _fields(_resolved(body, schemas), schemas)
            elif "description" in operation:
                yield f"<p>{escape(operation['description'])}</p>"
    yield "<h2>Values</h2>"
    for name, schema in schemas.items():
        if schema.get("properties"):
            yield f"<h3 id='{escape(name)}'>{escape(name)}</h3>"
            yield from _fields(schema, schemas)
    yield "</html>"


def _fields(schema: Schema, schemas: Schema) -> Iterator[str]:
    yield f"<p>{_text(schema)}</p><table><tr><th>field<th>type<th>meaning</tr>"
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        mark = " (required)" if name in required else ""
        yield f"<tr><td><code>{escape(name)}</code>{mark}<td>{_type(field, schemas)}<td>{_text(field)}</tr>"
    yield "</table>"


def _text(schema: Schema) -> str:
    return escape(schema.get("description", ""))


def _resolved(schema: Schema, schemas: Schema) -> Schema:
    name = schema.get("$ref", "").rpartition("/")[2]
    return schemas[name] if name else schema


def _type(schema: Schema, schemas: Schema) -> str:
    """Returns a type in few words, with links to those that have fields of their own."""
    if name := schema.get("$ref", "").rpartition("/")[2]:
        return f"<a href='#{escape(name)}'>{escape(name)}</a>"
    for kind in ("anyOf", "oneOf", "allOf"):
        if kind in schema:
            return " or ".join(dict.fromkeys(_type(one, schemas) for one in schema[kind]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    return escape(str(schema.get("type", "anything")))
