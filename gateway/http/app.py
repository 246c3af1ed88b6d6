"""The routes of the HTTP server, and their description at /openapi.json."""

import difflib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from msgspec.json import encode
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ... import __version__
from ...core.errors import InvalidRequest, PdserveError
from ...proto import pdserve_pb2 as pb
from ..serving import Serving
from . import answers
from .auth_middleware import AuthMiddleware
from .body import peer_of, read
from .chat_schema import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from .completions import Completions
from .errors import HttpRefusal, error_response
from .hosts import AllowedHosts
from .pages import Pages
from .probes import Probes
from .schema import CompletionRequest, ErrorResponse
from .words import in_http_words

Handler = Callable[[Request], Awaitable[Response]]
BODIES = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
PATH = "#/components/schemas/{model}"
READ = ["GET", "HEAD"]
MAX_NEAR_CHARS = 64  # of a path that is compared with those that are served
REFUSALS = (400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504)


def http_app(serving: Serving, hosts: AllowedHosts | None = None) -> AuthMiddleware:
    """Returns the whole server as an ASGI application, which refuses requests for names not in `hosts`."""
    # no redirects: behind a proxy with TLS they would lead to a URL without it, and take the key there
    app = FastAPI(
        title="pdserve",
        version=__version__,
        openapi_url=None,  # `Pages` serves it
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(PdserveError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_error)
    completions, tokens, probes = (
        Completions(serving),
        _Tokens(serving),
        Probes(serving.frontend, serving.shared),
    )
    posts: dict[str, tuple[Handler, type[BaseModel], type[BaseModel]]] = {
        "/v1/completions": (completions.complete, CompletionRequest, answers.Completion),
        "/v1/chat/completions": (completions.chat, ChatCompletionRequest, answers.ChatCompletion),
        "/tokenize": (tokens.tokenize, TokenizeRequest, answers.Tokens),
        "/detokenize": (tokens.detokenize, DetokenizeRequest, answers.Prompt),
    }
    for path, (handler, body, answer) in posts.items():
        _post(app, path, handler, body, answer)
    _get(app, "/v1/models", tokens.models, answers.Models)
    _get(
        app,
        "/v1/models/{model:path}",
        tokens.retrieve,
        answers.ServedModel,
        {404: {"model": ErrorResponse}},
        _MODEL,
    )
    app.add_api_route("/metrics", probes.metrics, name="metrics", response_class=PlainTextResponse)
    app.add_api_route("/metrics", probes.metrics, methods=["HEAD"], include_in_schema=False)
    _get(app, "/version", _version, answers.Version)
    _get(app, "/health", probes.health, answers.ClusterHealth, {503: {"model": answers.ClusterHealth}})
    _get(app, "/livez", probes.live, answers.ClusterHealth)
    _get(app, "/readyz", probes.ready, answers.ClusterHealth, {503: {"model": answers.ClusterHealth}})
    _get(app, "/startupz", probes.startup, answers.Startup, {503: {"model": answers.Startup}})
    pages = Pages(serving.model.name, lambda: _description(app))
    app.add_api_route("/", pages.index, methods=READ, include_in_schema=False)
    app.add_api_route("/docs", pages.docs, methods=READ, include_in_schema=False)
    app.add_api_route("/openapi.json", pages.openapi, methods=READ, include_in_schema=False)
    return AuthMiddleware(app, posts, serving.shared, hosts)


class _Tokens:
    """The handlers other than those that generate."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._created = int(time.time())

    async def models(self, http: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def retrieve(self, http: Request) -> Response:
        self._serving.model_info(pb.GetModelInfoRequest(model=http.path_params["model"]))
        return _json(self._model())

    async def tokenize(self, http: Request) -> Response:
        (message,), options = await read(http, "tokenize", self._serving)
        assert isinstance(message, pb.TokenizeRequest)
        tokens = await self._serving.tokenize(
            message, peer_of(http), http.state.caller, with_pieces=options.token_texts
        )
        payload = {
            "count": len(tokens.token_ids),
            "max_model_len": tokens.max_model_len,
            "tokens": list(tokens.token_ids),
        }
        return _json(payload | {"token_strs": list(tokens.pieces) if options.token_texts else None})

    async def detokenize(self, http: Request) -> Response:
        (message,), _ = await read(http, "detokenize", self._serving)
        assert isinstance(message, pb.DetokenizeRequest)
        text = await self._serving.detokenize(message, peer_of(http), http.state.caller)
        return _json({"prompt": text.text})

    def _model(self) -> dict[str, Any]:
        info = self._serving.model_info(pb.GetModelInfoRequest())
        payload = {"id": info.name, "object": "model", "created": self._created, "owned_by": "pdserve"}
        defaults = self._serving.model.default_sampling.stated
        return payload | {"max_model_len": info.max_model_len, "default_sampling": defaults}


async def _version(http: Request) -> Response:
    return _json({"version": __version__})


async def _on_error(http: Request, error: Exception) -> Response:
    options = getattr(http.state, "options", None)
    if isinstance(error, InvalidRequest) and options is not None:
        error = in_http_words(error, options)
    return error_response(error)


async def _on_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        response = error_response(
            HttpRefusal(405, "method_not_allowed", f"{http.url.path} does not take {http.method}")
        )
        response.headers.update(error.headers or {})
        return response
    return error_response(HttpRefusal(error.status_code, "not_found", f"there is no {_near(http.url.path)}"))


def _near(path: str) -> str:
    """Returns a path that is not served, with the one that may be meant: base URLs often lack /v1."""
    paths = [f"/v1/{name}" for name in ("chat/completions", "completions", "models")]
    similar = difflib.get_close_matches(path[:MAX_NEAR_CHARS], paths, n=1, cutoff=0.8)
    return f"{path}; did you mean {similar[0]}?" if similar else path


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


_MODEL = {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}


def _get(
    app: FastAPI,
    path: str,
    handler: Handler,
    answer: type[BaseModel],
    others: Any = None,
    described: Any = None,
) -> None:
    app.add_api_route(
        path, handler, response_model=answer, responses=others, openapi_extra=described, name=_name(path)
    )
    app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


def _post(app: FastAPI, path: str, handler: Handler, body: type[BaseModel], answer: type[BaseModel]) -> None:
    content = {"application/json": {"schema": {"$ref": PATH.format(model=body.__name__)}}}
    app.add_api_route(
        path,
        handler,
        methods=["POST"],
        response_model=answer,
        responses=_refusals(path),
        openapi_extra={"requestBody": {"required": True, "content": content}},
        name=_name(path),
    )


def _refusals(path: str) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in REFUSALS}
    if "completions" in path:
        responses[200] = {
            "content": {
                "text/event-stream": {"schema": {"description": "Events, each a chunk of the answer."}}
            }
        }
    return responses


def _name(path: str) -> str:
    return path.partition("{")[0].strip("/").replace("/", "_")


def _description(app: FastAPI) -> dict[str, Any]:
    """Returns FastAPI's description, extended by the bodies that our handlers read by themselves."""
    description = app.openapi()
    _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template=PATH)
    description.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
    return description
