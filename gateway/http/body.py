"""Reads the body of a request. `auth_middleware` has limited its size; the parser limits its
depth to 200 levels."""

from collections.abc import Sequence

from google.protobuf.message import Message
from starlette.requests import Request

from ..call_bounds import client_of, host_of
from ..serving import Serving
from .answer_options import AnswerOptions
from .errors import HttpRefusal


async def read(http: Request, route: str, serving: Serving) -> tuple[Sequence[Message], AnswerOptions]:
    """Returns the messages that the body has for `route`, at least one, and the shape of the answer.

    Raises InvalidRequest, UnknownModel or Refused; for large ones, QueueFull or NoWorkerAvailable.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith(
        "+json"
    ):  # a web page can send no JSON without a preflight request
        raise HttpRefusal(
            415, "unsupported_media_type", f"content-type: {kind!r} is not valid, expected application/json"
        )
    limits = serving.shared.config.limits
    state = http.state
    messages, state.options = await serving.intake.offload.body(
        route, await http.body(), state.request_id, limits, http_client(http), is_id_given=state.is_id_given
    )
    if state.options.request_id and not state.is_id_given:
        state.request_id = state.options.request_id
    return messages, state.options


def http_client(http: Request) -> str:
    """Returns the client that work ahead of the queue counts for."""
    return client_of(http.state.caller, host_of(peer_of(http)))


def peer_of(http: Request) -> str:
    """Returns the client that a request counts for: its host, as over HTTP, unlike gRPC, one client opens
    many connections."""
    return f"http:{http.client.host}" if http.client is not None else "http"
