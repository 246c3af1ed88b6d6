"""Processes every HTTP request before its handler: assigns its id, limits its body, and ends it when its
client disconnects."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from contextlib import suppress
from typing import Any

from ...core.errors import PdserveError
from ...core.held_bytes import Holding, TooLarge, TooManyBytes
from ...core.peer_log import failure_log
from ...core.validation import check_name
from ..auth.access import RequiredAccess, Revoked
from ..call_bounds import MESSAGE_TIMEOUT_S, OpenCalls, TooSlow, client_of
from ..places import NoPlace
from ..serving import Shared
from ..translate import ClientStalled
from .codings import MIN_ENCODED_BYTES, Decoder, accepts_gzip, coding_of, gzipped
from .cors import AllowedOrigins
from .errors import HttpRefusal, describe, error_json, error_response
from .hosts import AllowedHosts

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DISCARD_S = 1.0  # for the rest of a refused body
BREAK_OFF_S = 1.0  # for the last event of a stream that we end
BODILESS = ("GET", "HEAD")
PROBES = ("/health", "/livez", "/readyz", "/startupz")  # load balancers have no keys
METRICS = "/metrics"
REQUEST_ID = b"x-request-id"
EVENTS = b"text/event-stream; charset=utf-8"


def _check_path(path: str) -> None:
    """A route's pattern also matches its path with a line end behind it, for which `need_of` knows another
    key."""
    if not path.isprintable():
        raise HttpRefusal(404, "not_found", f"there is no {path!r}")


def _check_framing(scope: Scope) -> None:
    """A proxy in front of us may have parsed such a request, and the data after it, by the other header (RFC
    9112, 6.1)."""
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        message = "content-length beside transfer-encoding, expected one of them"
        raise HttpRefusal(400, "ambiguous_length", message, closes=True)


def need_of(method: str, path: str) -> RequiredAccess:
    """Returns the access that a request requires."""
    if method not in BODILESS:
        return RequiredAccess.REQUEST
    if path in PROBES:
        return RequiredAccess.NOTHING
    return RequiredAccess.METRICS if path == METRICS else RequiredAccess.KEY


class AuthMiddleware:
    """An ASGI application around the one with the handlers."""

    def __init__(
        self, app: App, posts: Collection[str], shared: Shared, hosts: AllowedHosts | None = None
    ) -> None:
        """`posts` are the paths that take a body, all by POST."""
        self._app = app
        self._posts = posts
        self._hosts = hosts
        self._shared = shared
        self._origins = AllowedOrigins(shared.config.listen.cors_origins)
        self._calls = OpenCalls(shared.config.limits.max_open_calls)
        self._max_bytes = shared.config.limits.max_message_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"").decode("latin-1")
        request_id = given or uuid.uuid4().hex
        scope["state"] |= {"request_id": request_id, "is_id_given": bool(given), "caller": None}
        out = _Answer(send, scope)
        try:
            check_name("request_id", given)
            _check_path(scope["path"])
            _check_framing(scope)
            self._check_host(scope)
            out.extra = self._origins.headers(scope["headers"])
            if (permits := self._origins.preflight(scope["method"], scope["headers"])) is not None:
                await _permit(permits, _closing(out.send) if _has_body(scope) else out.send)
                return
            need = need_of(scope["method"], scope["path"])
            self._admit(scope, need)
            async with self._shared.revocation.watch(scope["state"]["caller"], need):
                if scope["method"] in BODILESS:
                    await self._app(scope, _replay(b""), out.send)
                elif scope["method"] == "POST" and scope["path"] in self._posts:
                    await self._call(scope, receive, out.send)
                else:
                    await self._app(scope, _replay(b""), _closing(out.send))
        except ClientStalled:
            scope["state"]["abort"]()
            await _gone(receive)
        except PdserveError as error:
            if out.has_begun:  # its key was revoked
                if not out.is_complete and not await out.break_off(error):
                    scope["state"]["abort"]()
                return
            if scope["method"] not in BODILESS and not isinstance(error, Revoked):
                await _discard(scope, receive)
            await error_response(error)(scope, receive, out.send)
        except Exception:
            failure_log.exception("a request failed")
            if not out.has_begun:
                await error_response(RuntimeError("see above"))(scope, receive, out.send)

    def _check_host(self, scope: Scope) -> None:
        host = next((value for name, value in scope["headers"] if name == b"host"), None)
        if self._hosts is not None and host is not None and host.decode("latin-1") not in self._hosts:
            got = f"host: {host.decode('latin-1')[:100]!r} is not a name of this server"
            expected = "expected an address, localhost or a name in listen.allowed_hosts"
            raise HttpRefusal(421, "unknown_host", f"{got}, {expected}", closes=True)

    def _admit(self, scope: Scope, need: RequiredAccess) -> None:
        """Authenticates before any of the body is read. Raises Unauthenticated, NotPermitted or
        RateLimited."""
        access = self._shared.access
        if access is None:
            return
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        # a proxy in front of us may have judged another one
        text = shown[0].decode("latin-1") if len(shown) == 1 else None
        scope["state"]["caller"] = access.admit(need, text, asyncio.get_running_loop().time())

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = client_of(scope["state"]["caller"], scope["client"][0] if scope["client"] else "")
        try:
            with (
                self._calls.enter(client),
                self._shared.answer(),
                self._shared.held_bytes.hold(client) as held,
                self._shared.held_answers.hold(client) as answer,
            ):
                scope["state"]["answer"] = answer
                body = await self._body(scope, receive, held)
                if body is not None:
                    with scope["state"]["in_use"]():  # not earlier: an endless body must not hold a place
                        await _unless_gone(self._app(scope, _replay(body), send), receive)
                        await scope["state"]["drained"]()
        except (NoPlace, TooManyBytes) as error:
            code = "too_many_calls" if isinstance(error, NoPlace) else "too_many_bytes"
            raise HttpRefusal(
                429, code, str(error), retry_after_s=error.retry_after_s, closes=True
            ) from error
        except TooLarge as error:
            raise HttpRefusal(413, "body_too_large", str(error), closes=True) from error

    async def _body(self, scope: Scope, receive: Receive, held: Holding) -> bytes | None:
        """Returns None if the client has disconnected. Raises Refused, TooLarge or TooManyBytes."""
        coding = coding_of(scope["headers"])
        decoder = None if coding is None else Decoder(coding)
        if any(
            name == b"content-length" and int(value) > self._max_bytes for name, value in scope["headers"]
        ):
            raise self._too_large()
        parts: list[bytes] = []
        num_received = 0
        try:
            async with asyncio.timeout(MESSAGE_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    held.take(len(message["body"]))
                    num_received += len(message["body"])
                    if num_received > self._max_bytes:
                        raise self._too_large()
                    if decoder is None:
                        parts.append(message["body"])
                    else:
                        await self._decode(decoder, message["body"], parts, held)
                    if not message["more_body"]:
                        if decoder is not None:
                            decoder.end()
                        return b"".join(parts)
        except TimeoutError:
            raise HttpRefusal(
                408, "body_too_slow", str(TooSlow("body", MESSAGE_TIMEOUT_S)), closes=True
            ) from None

    async def _decode(self, decoder: Decoder, data: bytes, parts: list[bytes], held: Holding) -> None:
        """Adds what `data` decodes to, which may be a thousand times as much: counted slice by slice."""
        num_decoded = sum(map(len, parts))
        for piece in decoder.feed(data):
            held.take(len(piece))
            num_decoded += len(piece)
            if num_decoded > self._max_bytes:
                raise self._too_large()
            parts.append(piece)
            await asyncio.sleep(0)

    def _too_large(self) -> HttpRefusal:
        text = f"the body is larger than {self._max_bytes} bytes"
        return HttpRefusal(413, "body_too_large", text, closes=True)


class _Answer:
    """Adds to a response what any response has, compresses it where its client accepts that, and records
    whether it has started."""

    def __init__(self, send: Send, scope: Scope) -> None:
        self._send = send
        self._scope = scope
        self.extra: list[tuple[bytes, bytes]] = []  # further headers
        self.has_begun = False
        self.is_complete = False
        self._has_events = False
        self._held_start: Message | None = None  # of an answer that will be compressed

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            given = message.get("headers", ())
            self._has_events = (b"content-type", EVENTS) in given
            # the body of the request may have named it
            request_id = (REQUEST_ID, self._scope["state"]["request_id"].encode("latin-1"))
            message["headers"] = [*given, request_id, *self.extra]
            if self._is_large_json(given):
                message["headers"].append((b"vary", b"accept-encoding"))
                if self._scope["method"] != "HEAD" and accepts_gzip(self._scope["headers"]):
                    self._held_start = message
                    return
        elif not message.get("more_body", False):
            self.is_complete = True
        if self._held_start is not None:
            start, self._held_start = self._held_start, None
            message["body"] = await gzipped(message["body"])
            length = (b"content-length", str(len(message["body"])).encode())
            kept = [header for header in start["headers"] if header[0] != b"content-length"]
            start["headers"] = [*kept, length, (b"content-encoding", b"gzip")]
            await self._send(start)
        await self._send(message)

    def _is_large_json(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Returns whether all of the body comes at once, and is worth compressing."""
        given = dict(headers)
        length = int(given.get(b"content-length", 0))
        return length >= MIN_ENCODED_BYTES and given.get(b"content-type") == b"application/json"

    async def break_off(self, error: PdserveError) -> bool:
        """Ends a started response with an event that states the reason; returns False if it is not a stream
        or is not being read."""
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
    """The handlers' source of the body; they are cancelled when their client disconnects."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _closing(send: Send) -> Send:
    """Sends a response after which the connection closes, as an unread body may follow."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    return closing


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _permit(headers: list[tuple[bytes, bytes]], send: Send) -> None:
    """Answers a preflight request."""
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(scope: Scope, receive: Receive) -> None:
    """Reads the rest of what a client sends, for a limited time: a client looks at the response only after
    sending, and may lose it if the connection closes earlier."""
    if any(name == b"expect" for name, _ in scope["headers"]):
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while (await receive()).get("more_body"):
                pass


async def _gone(receive: Receive) -> None:
    """Returns when the client has disconnected, or when its response is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(work: Awaitable[None], receive: Receive) -> None:
    """Carries out `work`; cancels it when the client disconnects."""
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
