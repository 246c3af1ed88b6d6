"""`/v1/completions` and `/v1/chat/completions`: one request or several, streamed or whole."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...core.request import Request
from ...proto import pdserve_pb2 as pb
from ..answer import Collector
from ..cost import Charge
from ..serving import Serving
from .body import read
from .chat_schema import ChatCompletionRequest
from .format import ChatFormat, CompletionFormat, Format, Wanted
from .schema import CompletionRequest, GenerationBody
from .sse import EventStream, merged
from .translate import chat_message, completion_messages


class Completions:
    """The handlers of both."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def complete(self, http: HttpRequest) -> Response:
        body = await read(http, CompletionRequest)
        messages = completion_messages(body, http.state.request_id, self._serving.shared.config.limits.max_prompts)
        with ExitStack() as paying:
            charges = paying.enter_context(self._serving.charged(messages, http.state.caller))
            requests = [await self._request(http, *each) for each in zip(messages, charges, strict=True)]
            echoes = tuple(map(self._text, messages, requests)) if body.echo else ()
            wanted = _wanted(body, body.logprobs is not None, echoes)
            form = self._format(CompletionFormat, f"cmpl-{http.state.request_id}", requests, wanted)
            return await self._answer(body, form, requests, charges, paying)

    async def chat(self, http: HttpRequest) -> Response:
        body = await read(http, ChatCompletionRequest)
        message = chat_message(body, http.state.request_id)
        with ExitStack() as paying:
            # as OpenAI has it, an answer is as long as it gets; a completion has 16 tokens, unless it is told otherwise
            charges = paying.enter_context(self._serving.charged([message], http.state.caller, fills=True))
            requests = [await self._request(http, message, charges[0], fills=True)]
            wanted = _wanted(body, body.logprobs)
            form = self._format(ChatFormat, f"chatcmpl-{http.state.request_id}", requests, wanted)
            return await self._answer(body, form, requests, charges, paying)

    async def _request(self, http: HttpRequest, message: pb.GenerateRequest, charge: Charge, fills: bool = False) -> Request:
        traceparent, caller = http.headers.get("traceparent"), http.state.caller
        return await self._serving.request(message, _peer(http), charge, traceparent=traceparent, caller=caller, fills=fills)

    def _format(self, kind: type[Format], answer_id: str, requests: Sequence[Request], wanted: Wanted) -> Format:
        serving = self._serving
        return kind(answer_id, int(time.time()), serving.model.name, requests, serving.tokenizer, wanted)

    async def _answer(
        self, body: GenerationBody, form: Format, requests: Sequence[Request], charges: Sequence[Charge], paying: ExitStack
    ) -> Response:
        events = merged([self._serving.events(*each) for each in zip(requests, charges, strict=True)])
        if not body.stream:
            return Response(await _whole(form, events, len(requests)), media_type="application/json")
        chunks = _chunks(form, events, paying.pop_all())
        # a request that ends before its first token has an HTTP status of its own
        first = await anext(chunks)
        return EventStream(first, chunks, self._serving.shared.config.limits.max_unread_s)

    def _text(self, message: pb.GenerateRequest, request: Request) -> str:
        return message.prompt.text or self._serving.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)


async def _whole(form: Format, events: AsyncGenerator[tuple[int, pb.GenerateEvent], None], num_prompts: int) -> bytes:
    collectors = [Collector() for _ in range(num_prompts)]
    async with aclosing(events):
        async for prompt, event in events:
            collectors[prompt].add(event)
    return form.whole([collector.response() for collector in collectors])


async def _chunks(
    form: Format, events: AsyncGenerator[tuple[int, pb.GenerateEvent], None], paying: ExitStack
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, which outlives its handler; `paying` is closed with it."""
    with paying:
        async with aclosing(events):
            async for prompt, event in events:
                if chunk := form.chunk(prompt, event):
                    yield chunk
    yield form.last()


def _wanted(body: GenerationBody, logprobs: bool, echoes: tuple[str, ...] = ()) -> Wanted:
    options = body.stream_options
    return Wanted(
        token_ids=body.return_token_ids,
        logprobs=logprobs,
        usage=options is not None and options.include_usage,
        running_usage=options is not None and options.continuous_usage_stats,
        echoes=echoes,
    )


def _peer(http: HttpRequest) -> str:
    """Whom a request counts for: its host, as the connections of one client are many here, unlike with gRPC."""
    return f"http:{http.client.host}" if http.client is not None else "http"
