"""The interceptor that every gRPC call passes before its handler: the call is authenticated before its
message is read, takes a place among the open calls, and has its message received and parsed within bounds.

All methods are served as streams at the protocol level, whatever their handlers are: gRPC would call a unary
handler only once the message has arrived, and a call whose message never arrives could not be counted."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import grpc
from google.protobuf.message import Message

from ...core.config import LimitsSection
from ...core.errors import InvalidRequest, PdserveError
from ...core.held_bytes import HeldBytes, Holding
from ...proto import pdserve_pb2 as pb
from ..auth.access import Access, Caller, NotPermitted, RequiredAccess
from ..auth.revocation import Revocation
from ..call_bounds import (
    MESSAGE_TIMEOUT_S,
    KeylessCalls,
    OpenCalls,
    PendingReads,
    TooSlow,
    client_of,
    host_of,
)
from ..connections import GrpcConnections
from ..offload.offload import SMALL_BYTES
from ..places import NAMES_KEPT, connection_name
from ..translate import translated, write_within

MAX_HEADERS = 128  # metadata entries per call: HPACK references expand to more, to exhaust memory
ANSWER: ContextVar[Holding] = ContextVar("answer")  # what the call holds of its answer until that is sent
CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)  # the call that this task serves

_SERVICES = {
    "grpc.health.v1.Health": RequiredAccess.NOTHING,
    f"{pb.DESCRIPTOR.package}.Generation": RequiredAccess.REQUEST,
    f"{pb.DESCRIPTOR.package}.Cluster": RequiredAccess.ADMIN,
}
_METHODS = {  # for its own requests a client has received most of it
    f"{pb.DESCRIPTOR.package}.Cluster/{method}": RequiredAccess.KEY for method in ("Explain", "ListRequests")
}

ADMIN_SERVICES = tuple(name for name, need in _SERVICES.items() if need is RequiredAccess.ADMIN)
_ADMIN_IS_LOCAL = (
    "without listen.api_keys only the user who started the cluster administers it, over a Unix socket on the"
    " head's host; listen.api_keys with a key marked admin, or listen.admin_without_key: true, offer it"
    " over TCP"
)

MessageReader = Callable[[type[Message], bytes, str], Awaitable[Message]]  # as `Serving.message`
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # a grpc.RpcMethodHandler, whose fields its stubs do not name


def need_of(method: str) -> RequiredAccess:
    """Returns the access that a method (`/package.Service/Method`) requires; unknown methods require a
    key."""
    return _METHODS.get(method.strip("/")) or _SERVICES.get(service_of(method), RequiredAccess.KEY)


def service_of(method: str) -> str:
    """Returns the service in a method's full name."""
    return method.strip("/").partition("/")[0]


class CallBounds:
    """The bounds on everything that the calls of one server hold open. `held_bytes` and `held_answers` may be
    shared with another server."""

    def __init__(
        self,
        limits: LimitsSection,
        held_bytes: HeldBytes,
        held_answers: HeldBytes,
        connections: GrpcConnections,
    ) -> None:
        self.open_calls = OpenCalls(limits.max_open_calls)
        self.keyless_calls = KeylessCalls()
        self.reads = PendingReads(limits.max_held_bytes // 2 // limits.max_message_bytes)
        self.held_bytes = held_bytes
        self.held_answers = held_answers
        self.connections = connections
        self.max_unread_s = limits.max_unread_s

    @asynccontextmanager
    async def enter(self, is_keyless: bool, client: str, connection: str) -> AsyncIterator[None]:
        """Wraps a call. Raises NoPlace."""
        if is_keyless:
            async with self.keyless_calls.enter(client, connection):
                yield
        else:
            with self.open_calls.enter(client), self.connections.in_use(connection):
                yield


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic for the stubs alone
    """Admits calls to all services of a server. Without `access`, clients need no keys, and may administer
    the cluster only if `offers_admin`."""

    def __init__(
        self,
        access: Access | None,
        bounds: CallBounds,
        revocation: Revocation,
        reader: MessageReader,
        offers_admin: bool,
    ) -> None:
        self._access = access
        self._offers_admin = offers_admin
        self.bounds = bounds
        self._revocation = revocation
        self._read = reader
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}  # by method, for those that exist

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        details = handler_call_details
        need = need_of(details.method)
        num_headers = len(details.invocation_metadata or ())
        if num_headers > MAX_HEADERS:
            error = InvalidRequest("metadata", f"{num_headers} headers", f"at most {MAX_HEADERS}")
            return self._refusal(error, self.bounds.connections.close)
        try:
            if self._access is not None:
                shown = [
                    value for name, value in details.invocation_metadata or () if name == "authorization"
                ]
                text = shown[0] if len(shown) == 1 and isinstance(shown[0], str) else None
                CALLER.set(self._access.admit(need, text, asyncio.get_running_loop().time()))
            elif not self._offers_admin and service_of(details.method) in ADMIN_SERVICES:
                raise NotPermitted(f"{service_of(details.method)}: {_ADMIN_IS_LOCAL}")
        except PdserveError as error:
            return self._refusal(error, self._add_unauthenticated)
        if details.method not in self._handlers:
            found: Handler = await continuation(details)
            if found is None:  # unknown methods are not cached: clients can name any number of them
                return None  # type: ignore[return-value]  # omitted by the stubs
            self._handlers[details.method] = self._bounded(found, need)
        handler: grpc.RpcMethodHandler[Any, Any] = self._handlers[details.method]
        return handler

    def _bounded(self, handler: Handler, need: RequiredAccess) -> "grpc.RpcMethodHandler[Any, Any]":
        behaviour = handler.unary_unary or handler.unary_stream
        kind: type[Message] = getattr(handler.request_deserializer, "__self__", Message)  # of `FromString`

        async def call(messages: Any, context: Context) -> None:
            peer, caller = context.peer(), CALLER.get()
            client, connection = client_of(caller, host_of(peer)), connection_of(peer)
            is_keyless = need is RequiredAccess.NOTHING and caller is None and not peer.startswith("unix:")
            if is_keyless:
                self._add_unauthenticated(connection)
            async with (
                translated(context),
                self._revocation.watch(caller, need),
                self.bounds.enter(is_keyless, client, connection),
            ):
                if behaviour is None:
                    requests = _parsed(messages, handler.request_deserializer)
                    async for response in handler.stream_stream(requests, context):
                        await write_within(context, response, self.bounds.max_unread_s)
                    return
                data = await self._receive(context, client)
                with (
                    self.bounds.held_bytes.hold(client, len(data)),  # until the call ends
                    self.bounds.held_answers.hold(client) as answer,
                ):
                    ANSWER.set(answer)
                    request = await self._read(kind, data, client)
                    del data
                    response = await behaviour(request, context)
                    if not handler.response_streaming:
                        await write_within(context, response, self.bounds.max_unread_s)

        def serialized(response: Message | bytes) -> bytes:
            """Serializes a response, unless its service has done so, once for many calls."""
            data: bytes = response if isinstance(response, bytes) else handler.response_serializer(response)
            return data

        return grpc.stream_stream_rpc_method_handler(call, None, serialized)

    def _add_unauthenticated(self, connection: str) -> None:
        self.bounds.connections.add_unauthenticated(connection, asyncio.get_running_loop().time())

    def _refusal(
        self, error: PdserveError, count: Callable[[str], None]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Ends any call and has its connection counted. As a stream handler it does not wait for the client's
        message, which may be large."""

        async def refuse(requests: Any, context: Context) -> None:
            count(connection_of(context.peer()))
            async with translated(context):
                raise error

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _receive(self, context: Context, client: str) -> bytes:
        """Returns the one message of a call. Raises InvalidRequest, NoPlace or TooSlow."""
        async with self.bounds.reads.read(client):
            data: Any = await context.read()
        if not isinstance(data, bytes):  # grpc.aio.EOF, which its stubs omit
            raise InvalidRequest("message", "nothing", "one message")
        return data


async def _parsed(messages: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    """Yields the messages of a third-party service's stream, which are small. Raises InvalidRequest or
    TooSlow."""
    while True:
        try:
            async with asyncio.timeout(MESSAGE_TIMEOUT_S):
                data: bytes | None = await anext(messages, None)
        except TimeoutError:
            raise TooSlow("message", MESSAGE_TIMEOUT_S) from None
        if data is None:
            return
        if len(data) > SMALL_BYTES:
            raise InvalidRequest("message", f"{len(data)} bytes", f"at most {SMALL_BYTES} bytes")
        yield parse(data)


@lru_cache(NAMES_KEPT)
def connection_of(peer: str) -> str:
    """Returns the connection name in gRPC's name for a peer."""
    host = host_of(peer)
    return connection_name(host, peer.rpartition(":")[2]) if peer.startswith("ip") else peer
