"""`/v1/completions` and `/v1/chat/completions`: one request or several, streamed or whole."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...core.held_bytes import Holding
from ...core.request import Request
from ...proto import pdserve_pb2 as pb
from ..answer import Collector, kept_bytes
from ..auth.cost import Charge
from ..in_turns import in_turns
from ..offload.fair_threads import FairThreads
from ..serving import Serving
from .answer_options import AnswerOptions
from .body import http_client, peer_of, read
from .format import ChatFormat, CompletionFormat, Format, Wanted
from .sse import EventStream, merged

# of a response that is assembled on the loop: they may hold many other tokens' log probabilities
INLINE_TOKENS = 256


class Completions:
    """The handlers of both routes."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def complete(self, http: HttpRequest) -> Response:
        messages, options = await read(http, "completions", self._serving)
        generates = [message for message in messages if isinstance(message, pb.GenerateRequest)]
        with ExitStack() as paying:
            charges = paying.enter_context(self._serving.charged(generates, http.state.caller))
            requests, echoes = [], []
            async for message, charge in in_turns(zip(generates, charges, strict=True), every=1):
                requests.append(await self._request(http, message, charge))
                if options.echo:
                    echoes.append(await self._text(http, message, requests[-1]))
            form = self._format(
                CompletionFormat, f"cmpl-{http.state.request_id}", requests, _wanted(options, tuple(echoes))
            )
            return await self._answer(http, options, form, requests, charges, paying)

    async def chat(self, http: HttpRequest) -> Response:
        (message,), options = await read(http, "chat", self._serving)
        assert isinstance(message, pb.GenerateRequest)
        with ExitStack() as paying:
            # as at OpenAI, a chat answer has no default limit; a completion has 16 tokens unless it asks for
            # more
            charges = paying.enter_context(self._serving.charged([message], http.state.caller, fills=True))
            requests = [await self._request(http, message, charges[0], fills=True)]
            form = self._format(ChatFormat, f"chatcmpl-{http.state.request_id}", requests, _wanted(options))
            return await self._answer(http, options, form, requests, charges, paying)

    async def _request(
        self, http: HttpRequest, message: pb.GenerateRequest, charge: Charge, fills: bool = False
    ) -> Request:
        traceparent, caller = http.headers.get("traceparent"), http.state.caller
        return await self._serving.request(
            message, peer_of(http), charge, traceparent=traceparent, caller=caller, fills=fills
        )

    def _format(
        self, kind: type[Format], answer_id: str, requests: Sequence[Request], wanted: Wanted
    ) -> Format:
        serving = self._serving
        return kind(answer_id, int(time.time()), serving.model.name, requests, serving.tokenizer, wanted)

    async def _answer(
        self,
        http: HttpRequest,
        options: AnswerOptions,
        form: Format,
        requests: Sequence[Request],
        charges: Sequence[Charge],
        paying: ExitStack,
    ) -> Response:
        threads, client, held = self._serving.intake.offload.threads, http_client(http), http.state.answer
        events = merged([self._serving.events(*each) for each in zip(requests, charges, strict=True)])
        if not options.stream:
            whole = await _whole(form, events, len(requests), threads, client, held)
            return Response(whole, media_type="application/json")
        chunks = _chunks(form, events, paying.pop_all(), threads, client, held)
        # a request that ends before its first token has an HTTP status of its own
        first = await anext(chunks)
        return EventStream(first, chunks, self._serving.shared.config.limits.max_unread_s)

    async def _text(self, http: HttpRequest, message: pb.GenerateRequest, request: Request) -> str:
        is_whole = message.prompt.text and not message.prompt.HasField("truncate_tokens")
        return (
            message.prompt.text
            if is_whole
            else await self._serving.text(request.prompt_token_ids, True, http_client(http))
        )


async def _whole(
    form: Format,
    events: AsyncGenerator[tuple[int, pb.GenerateEvent], None],
    num_prompts: int,
    threads: FairThreads,
    client: str,
    held: Holding,
) -> bytes:
    collectors = [Collector() for _ in range(num_prompts)]
    async with aclosing(events):
        async for prompt, event in events:
            held.take(kept_bytes(event))
            collectors[prompt].add(event)
    responses = [collector.response() for collector in collectors]
    num_tokens = sum(len(choice.token_ids) for response in responses for choice in response.choices)
    if num_tokens + sum(len(response.prompt.token_ids) for response in responses) <= INLINE_TOKENS:
        return form.whole(responses)
    return await threads.run(client, form.whole, responses)


async def _chunks(
    form: Format,
    events: AsyncGenerator[tuple[int, pb.GenerateEvent], None],
    paying: ExitStack,
    threads: FairThreads,
    client: str,
    held: Holding,
) -> AsyncGenerator[bytes, None]:
    """Yields the events of a stream, which outlives its handler; `paying` is closed with it."""
    with paying:
        async with aclosing(events):
            # prompts whose log probabilities have arrived, and are sent with their first token
            with_logprobs = set()
            async for prompt, event in events:
                is_large = prompt in with_logprobs
                chunk = (
                    await threads.run(client, form.chunk, prompt, event)
                    if is_large
                    else form.chunk(prompt, event)
                )
                with_logprobs.discard(prompt)
                if event.HasField("prompt"):
                    held.take(kept_bytes(event))
                    with_logprobs.add(prompt)
                if chunk:
                    yield chunk
    yield form.last()


def _wanted(options: AnswerOptions, echoes: tuple[str, ...] = ()) -> Wanted:
    return Wanted(
        token_ids=options.token_ids,
        logprobs=options.logprobs,
        usage=options.usage,
        running_usage=options.running_usage,
        echoes=echoes,
    )
