"""What every HTTP request passes before its handler: its id, its body within limits, and an end when its client goes away."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from ...core.errors import PdserveError
from ...core.validation import check_name
from ..access import Need, Revoked
from ..serving import Shared
from ..translate import ClientStalled
from .errors import Refused, describe, error_json, error_response
from .hosts import AllowedHosts

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_TIMEOUT_S = 60.0  # for the whole body of a request
DISCARD_S = 1.0  # for the rest of a body that is refused
BREAK_OFF_S = 1.0  # for the last event of a stream that is ended by us
RETRY_BUSY_S = 1.0
BODILESS = ("GET", "HEAD")
PROBES = ("/health", "/livez", "/readyz", "/startupz")  # load balancers have no keys
METRICS = "/metrics"
REQUEST_ID = b"x-request-id"
EVENTS = b"text/event-stream; charset=utf-8"


def need_of(method: str, path: str) -> Need:
    """The right that a client needs for a request."""
    if method not in BODILESS:
        return Need.REQUEST
    if path in PROBES:
        return Need.NOTHING
    return Need.METRICS if path == METRICS else Need.KEY


class Gate:
    """An ASGI application around the one with the handlers."""

    def __init__(self, app: App, shared: Shared, hosts: AllowedHosts | None = None) -> None:
        self._app = app
        self._hosts = hosts
        self._shared = shared
        self._max_calls = shared.config.limits.max_open_calls
        self._max_bytes = shared.config.limits.max_message_bytes
        self._num_calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"").decode("latin-1")
        request_id = given or uuid.uuid4().hex
        scope["state"] |= {"request_id": request_id, "caller": None}
        out = _Answer(send, request_id)
        try:
            check_name("request_id", given)
            self._check_host(scope)
            need = need_of(scope["method"], scope["path"])
            self._admit(scope, need)
            async with self._shared.revocation.watch(scope["state"]["caller"], need):
                if scope["method"] in BODILESS:
                    await self._app(scope, receive, out.send)
                else:
                    await self._call(scope, receive, out.send)
        except ClientStalled:
            scope["state"]["abort"]()
            await _gone(receive)
        except PdserveError as error:
            if out.has_begun:  # its key was taken away
                if not await out.break_off(error):
                    scope["state"]["abort"]()
                return
            if scope["method"] not in BODILESS and not isinstance(error, Revoked):
                await _discard(scope, receive)
            await error_response(error)(scope, receive, out.send)
        except Exception:
            log.exception("a request failed")
            if not out.has_begun:
                await error_response(RuntimeError("see above"))(scope, receive, out.send)

    def _check_host(self, scope: Scope) -> None:
        host = next((value for name, value in scope["headers"] if name == b"host"), None)
        if self._hosts is not None and host is not None and host.decode("latin-1") not in self._hosts:
            got = f"host: {host.decode('latin-1')[:100]!r} is not a name of this server"
            expected = "expected an address, localhost or a name in listen.allowed_hosts"
            raise Refused(421, "unknown_host", f"{got}, {expected}", closes=True)

    def _admit(self, scope: Scope, need: Need) -> None:
        """Before anything of the body is read. Raises Unauthenticated, NotPermitted or RateLimited."""
        access = self._shared.access
        if access is None:
            return
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scope["state"]["caller"] = access.admit(need, shown, asyncio.get_running_loop().time())

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._num_calls >= self._max_calls:
            message = f"{self._max_calls} calls are open already, retry in {RETRY_BUSY_S:.1f} s"
            raise Refused(429, "too_many_calls", message, retry_after_s=RETRY_BUSY_S, closes=True)
        self._num_calls += 1
        try:
            with self._shared.answer():
                body = await self._body(scope, receive)
                if body is not None:
                    await _unless_gone(self._app(scope, _replay(body), send), receive)
        finally:
            self._num_calls -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """None when the client has gone."""
        too_large = Refused(413, "body_too_large", f"the body is larger than {self._max_bytes} bytes", closes=True)
        if any(name == b"content-length" and int(value) > self._max_bytes for name, value in scope["headers"]):
            raise too_large
        parts, num_bytes = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message["body"])
                    num_bytes += len(message["body"])
                    if num_bytes > self._max_bytes:
                        raise too_large
                    if not message["more_body"]:
                        return b"".join(parts)
        except TimeoutError:
            told = f"the body did not come within {BODY_TIMEOUT_S:g} s"
            raise Refused(408, "body_too_slow", told, closes=True) from None


class _Answer:
    """Adds the request's id to its answer, and knows whether there is one."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._header = (REQUEST_ID, request_id.encode("latin-1"))
        self.has_begun = False
        self._has_events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self._has_events = (b"content-type", EVENTS) in message.get("headers", ())
            message["headers"] = [*message.get("headers", ()), self._header]
        await self._send(message)

    async def break_off(self, error: PdserveError) -> bool:
        """End an answer that has begun with an event that says why; False when it is no stream, or nobody reads it."""
        if not self._has_events:
            return False
        event = b"data: " + error_json(describe(error)[1]) + b"\n\n"
        try:
            async with asyncio.timeout(BREAK_OFF_S):
                await self._send({"type": "http.response.body", "body": event, "more_body": False})
        except TimeoutError:
            return False
        return True


def _replay(body: bytes) -> Receive:
    """Handlers read the body from here; that their client has gone they see by being cancelled."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _discard(scope: Scope, receive: Receive) -> None:
    """Read what a client still sends for a while: it looks at the answer after that, and a connection that is closed before
    may lose it."""
    if any(name == b"expect" for name, _ in scope["headers"]):
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while (await receive()).get("more_body"):
                pass


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone, or when its answer is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(work: Awaitable[None], receive: Receive) -> None:
    """Carry out `work`; cancel it when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
    if not task.cancelled():
        task.result()
