"""The gRPC Generation service: one handler per call, around `serving`, which both servers share."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from ..answer import Collector, kept_bytes
from ..serving import Serving
from ..translate import translated
from .auth_interceptor import ANSWER, CALLER
from .patient_writer import PatientWriter

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(pdserve_pb2_grpc.GenerationServicer):
    """Text in, text out."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    # grpc.aio accepts coroutines that write as well as generators; writing shows when a client does not read
    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        with self._serving.shared.answer():
            async with (
                translated(context),
                PatientWriter(context, self._serving.shared.config.limits.max_unread_s) as writer,
                aclosing(self._events(request, context)) as events,
            ):
                async for event in events:
                    await writer.write(event)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        with self._serving.shared.answer():
            async with translated(context), aclosing(self._events(request, context)) as events:
                if request.resume_from:
                    raise InvalidRequest(
                        "resume_from", list(request.resume_from[:8]), "nothing: the answer comes as a whole"
                    )
                collector, held = Collector(), ANSWER.get()
                async for event in events:
                    held.take(kept_bytes(event))
                    collector.add(event)
                return collector.response()
        raise AssertionError("translated() ends the call")

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with translated(context):
            return await self._serving.tokenize(request, context.peer(), CALLER.get())
        raise AssertionError("translated() ends the call")

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with translated(context):
            return await self._serving.detokenize(request, context.peer(), CALLER.get())
        raise AssertionError("translated() ends the call")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        async with translated(context):
            return self._serving.model_info(request)
        raise AssertionError("translated() ends the call")

    async def _events(
        self, message: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateEvent, None]:
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else asyncio.get_running_loop().time() + remaining_s
        caller, traceparent = CALLER.get(), _metadata(context, "traceparent")
        with self._serving.charged([message], caller) as (charge,):
            request = await self._serving.request(
                message, context.peer(), charge, deadline_s=deadline_s, traceparent=traceparent, caller=caller
            )
            async with aclosing(self._serving.events(request, charge, message.resume_from)) as events:
                async for event in events:
                    yield event


def _metadata(context: Context, key: str) -> str | None:
    """Returns the metadata value that a client sent with its call under `key`."""
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else None
    return None
