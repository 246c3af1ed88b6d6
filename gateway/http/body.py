"""Reads the body of a request. Its size is limited before (`gate`), its depth by the parser: 200 levels."""

from collections.abc import Sequence

from google.protobuf.message import Message
from starlette.requests import Request

from ..call_bounds import client_of, host_of
from ..serving import Serving
from .bodies import Asked
from .errors import HttpRefusal


async def read(http: Request, route: str, serving: Serving) -> tuple[Sequence[Message], Asked]:
    """The messages that the body has for `route`, at least one, and what the answer is to look like.

    Raises InvalidRequest, UnknownModel or Refused; for large ones, QueueFull or NoWorkerAvailable.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith(
        "+json"
    ):  # what a web page may send without being asked is not JSON
        raise HttpRefusal(
            415, "unsupported_media_type", f"content-type: {kind!r} is not valid, expected application/json"
        )
    limits = serving.shared.config.limits
    return await serving.intake.offload.body(
        route, await http.body(), http.state.request_id, limits, http_client(http)
    )


def http_client(http: Request) -> str:
    """Whom work before the queue counts for."""
    return client_of(http.state.caller, host_of(peer_of(http)))


def peer_of(http: Request) -> str:
    """Whom a request counts for: its host, as the connections of one client are many here, unlike with
    gRPC."""
    return f"http:{http.client.host}" if http.client is not None else "http"
