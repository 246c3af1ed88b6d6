"""The Generation service: one handler per call, from the client's message to the router and back.

Whatever ends a call (its end, an error, a cancelled call, a deadline, a client that stopped reading), leaving the handler
closes the router's stream, and that frees all that workers hold for the request.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import grpc

from .. import __version__
from ..core.config import ClusterConfig
from ..core.errors import DuplicateRequest, InvalidRequest, NoWorkerAvailable, QueueFull
from ..core.request import Request
from ..proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from ..telemetry.logs import REQUEST_ID
from .access import Access, Caller
from .answer import Answer, Collector
from .frontend import Frontend
from .guard import CALLER
from .intake import Intake, ModelInfo, refuse_unknown_fields, shown_id
from .tokenizer import Tokenizer
from .translate import ClientGone, ClientStalled, translated

Context = grpc.aio.ServicerContext[Any, Any]

T = TypeVar("T")
INLINE_TOKENS = 1024  # so many are decoded without a thread
FLUSH_S = 5.0  # how long clients may take to read the rest of their answers when the cluster ends


class Shared:
    """What the two services have in common: the configuration in force, who is let in, how many answers are being given."""

    def __init__(self, config: ClusterConfig, access: Access | None = None) -> None:
        self.config = config
        self.access = access
        self._num_answers = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Around giving an answer."""
        self._num_answers += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_answers -= 1
            if not self._num_answers:
                self._idle.set()

    async def answered(self) -> None:
        """Returns when all answers are out, or after a while: the router may be done with a request before its client."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), FLUSH_S)


class GenerationService(pdserve_pb2_grpc.GenerationServicer):
    """Text in, text out."""

    def __init__(self, frontend: Frontend, shared: Shared, tokenizer: Tokenizer, model: ModelInfo) -> None:
        self._frontend = frontend
        self._shared = shared
        self._tokenizer = tokenizer
        self._model = model
        self._intake = Intake(tokenizer, model)

    # grpc.aio takes coroutines that write as well as generators; writing lets us see when a client does not read
    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        with self._shared.answer():
            async with translated(context), aclosing(self._events(request, context)) as events:
                async for event in events:
                    await self._write(context, event)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        with self._shared.answer():
            async with translated(context), aclosing(self._events(request, context)) as events:
                if request.resume_from:
                    raise InvalidRequest("resume_from", list(request.resume_from[:8]), "nothing: the answer comes as a whole")
                collector = Collector()
                async for event in events:
                    collector.add(event)
                return collector.response()
        raise AssertionError("translated() ends the call")

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with translated(context):
            refuse_unknown_fields(request)
            self._intake.check_model(request.model)
            token_ids = await self._intake.token_ids(request.prompt)
            self._check_ids("prompt.token_ids", token_ids)
            pieces = await self._off_loop(
                len(token_ids), lambda: [self._tokenizer.decode([token_id]) for token_id in token_ids]
            )
            return pb.TokenizeResponse(token_ids=token_ids, pieces=pieces, max_model_len=self._model.max_model_len)
        raise AssertionError("translated() ends the call")

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with translated(context):
            refuse_unknown_fields(request)
            self._intake.check_model(request.model)
            self._check_ids("token_ids", request.token_ids)
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            text = await self._off_loop(
                len(request.token_ids), lambda: self._tokenizer.decode(request.token_ids, skip_special_tokens=skip)
            )
            return pb.DetokenizeResponse(text=text)
        raise AssertionError("translated() ends the call")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        async with translated(context):
            refuse_unknown_fields(request)
            self._intake.check_model(request.model)
            return self._model_info()
        raise AssertionError("translated() ends the call")

    async def _events(self, message: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateEvent, None]:
        loop = asyncio.get_running_loop()
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else loop.time() + remaining_s
        caller, limits, traceparent = CALLER.get(), self._shared.config.limits, _metadata(context, "traceparent")
        request = await self._intake.request(message, limits, deadline_s, context.peer(), traceparent, caller)
        REQUEST_ID.set(request.request_id)
        answer = Answer(
            request,
            self._tokenizer,
            lambda choice: self._frontend.cancel(request.request_id, choice),
            message.resume_from,
        )
        async with self._paid(request, caller, answer), aclosing(self._frontend.generate(request)) as events:
            async for event in events:
                for out in answer.handle(event):
                    yield out

    @asynccontextmanager
    async def _paid(self, request: Request, caller: Caller | None, answer: Answer) -> AsyncIterator[None]:
        """Around carrying a request out: it takes its tokens of its key's rate, and gives back what it did not use."""
        if self._shared.access is None:
            yield
            return
        loop = asyncio.get_running_loop()
        charge = self._shared.access.charge(caller, request, loop.time())
        has_begun = True
        try:
            yield
        except (QueueFull, DuplicateRequest, NoWorkerAvailable) as error:
            has_begun = False
            raise DuplicateRequest(shown_id(request)) if isinstance(error, DuplicateRequest) else error
        finally:
            charge.settle(answer.num_tokens, loop.time(), has_begun)

    async def _write(self, context: Context, event: pb.GenerateEvent) -> None:
        max_unread_s = self._shared.config.limits.max_unread_s
        try:
            async with asyncio.timeout(max_unread_s):
                await context.write(event)
        except TimeoutError:
            raise ClientStalled(max_unread_s) from None
        except grpc.aio.InternalError:  # a write that was waiting when its call was cancelled
            raise ClientGone from None

    async def _off_loop(self, num_tokens: int, work: Callable[[], T]) -> T:
        """On a thread when there is much of it, so that streams go on."""
        return work() if num_tokens <= INLINE_TOKENS else await asyncio.to_thread(work)

    def _check_ids(self, field: str, token_ids: Any) -> None:
        for index, token_id in enumerate(token_ids):
            if token_id >= self._model.vocab_size:
                raise InvalidRequest(f"{field}[{index}]", token_id, f"0 to {self._model.vocab_size - 1}")

    def _model_info(self) -> pb.ModelInfo:
        model, limits = self._model, self._shared.config.limits
        return pb.ModelInfo(
            name=model.name,
            architecture=model.architecture,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=self._tokenizer.has_chat_template,
            limits=pb.Limits(
                max_prompt_tokens=limits.max_prompt_tokens or model.max_model_len - 1,
                max_tokens=limits.max_tokens,
                max_n=limits.max_n,
                max_logprobs=limits.max_logprobs,
                max_stop_strings=limits.max_stop_strings,
                max_message_bytes=limits.max_message_bytes,
            ),
            version=__version__,
        )


def _metadata(context: Context, key: str) -> str | None:
    """The value that a client sent along with its call under `key`."""
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else None
    return None
