"""The gRPC door's guard: lets a call in, or refuses it before its message is read."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc

from ..core.errors import PdserveError
from ..proto import pdserve_pb2 as pb
from .access import Access, Caller, Need
from .translate import translated

CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)  # of the call whose task this is

_SERVICES = {
    "grpc.health.v1.Health": Need.NOTHING,
    f"{pb.DESCRIPTOR.package}.Generation": Need.REQUEST,
    f"{pb.DESCRIPTOR.package}.Cluster": Need.ADMIN,
}


def need_of(method: str) -> Need:
    """What the full name of a method (`/package.Service/Method`) asks; a key for whatever is not known here."""
    return _SERVICES.get(method.strip("/").partition("/")[0], Need.KEY)


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
