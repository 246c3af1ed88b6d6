"""What stands before the services of the gRPC door: a guard that refuses calls before their message is read, and a reader
that refuses messages which cannot be read."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ..core.errors import InvalidRequest, PdserveError
from ..proto import pdserve_pb2 as pb
from .access import Access, Caller, Need, NotPermitted
from .translate import translated

CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)  # of the call whose task this is

_SERVICES = {
    "grpc.health.v1.Health": Need.NOTHING,
    f"{pb.DESCRIPTOR.package}.Generation": Need.REQUEST,
    f"{pb.DESCRIPTOR.package}.Cluster": Need.ADMIN,
}
_METHODS = {f"{pb.DESCRIPTOR.package}.Cluster/Explain": Need.KEY}  # of its own requests a client has been told most of it


def need_of(method: str) -> Need:
    """What the full name of a method (`/package.Service/Method`) asks; a key for whatever is not known here."""
    name = method.strip("/")
    return _METHODS.get(name) or _SERVICES.get(name.partition("/")[0], Need.KEY)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic for the stubs alone
    """For a server that strangers can reach."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        details = handler_call_details
        shown = dict(details.invocation_metadata or ()).get("authorization")
        try:
            text = shown if isinstance(shown, str) else None
            CALLER.set(self._access.admit(need_of(details.method), text, asyncio.get_running_loop().time()))
        except PdserveError as error:
            return _refusal(error)
        return await continuation(details)


def _refusal(error: PdserveError) -> "grpc.RpcMethodHandler[Any, Any]":
    """Ends any call. As a handler of streams it does not wait for the client's message, which may be large."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with translated(context):
            raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


class NoAdmin(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic for the stubs alone
    """For a server without keys that other users can reach: it offers nothing of the `Cluster` service."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        service = handler_call_details.method.strip("/").partition("/")[0]
        if _SERVICES.get(service) is Need.ADMIN:
            return _refusal(NotPermitted(f"{service}: {_ADMIN_IS_LOCAL}"))
        return await continuation(handler_call_details)


_ADMIN_IS_LOCAL = (
    "without listen.api_keys only the user who started the cluster administers it, over a Unix socket on the head's host; "
    "listen.api_keys with a key marked admin, or listen.admin_without_key: true, offer it over TCP"
)


class Reader(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic for the stubs alone
    """Answers bytes that are no message of the call's type with INVALID_ARGUMENT. gRPC itself would call it UNKNOWN, name
    classes of ours, and write a traceback into the log for each."""

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}  # by method, as far as they are ours

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(handler_call_details)
        if handler is not None and method.startswith(f"/{pb.DESCRIPTOR.package}."):
            handler = self._handlers[method] = _reading(handler)
        return handler


class _Unreadable(Exception):
    """Stands for the message in the handler's call."""


def _reading(handler: Any) -> Any:
    read, behaviour = handler.request_deserializer, handler.unary_unary or handler.unary_stream

    def deserialize(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return _Unreadable(f"{len(data)} bytes")

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if not isinstance(request, _Unreadable):
            return await behaviour(request, context)
        async with translated(context):
            raise InvalidRequest("message", str(request), "the call's message in protobuf's wire format, with texts in UTF-8")

    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    return handler._replace(request_deserializer=deserialize, **{kind: call})
