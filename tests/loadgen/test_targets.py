"""Both servers as a load sees them: pdserve's own gRPC server, and a scripted OpenAI-compatible one."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from pdserve.core.errors import QueueFull
from pdserve.gateway.app import GatewayServer
from pdserve.loadgen.errors import LoadRequestFailed
from pdserve.loadgen.grpc_target import GrpcTarget, legs_of
from pdserve.loadgen.http_target import HttpTarget
from pdserve.loadgen.target import LoadRequest
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.support import ScriptedCluster, model_info

ASKED = LoadRequest([10, 11, 12], max_tokens=4)
DONE = b"data: [DONE]\n\n"


class Seen:
    """The number of tokens of each chunk."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, num_tokens: int) -> None:
        self.numbers.append(num_tokens)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
async def over_grpc(server: GatewayServer) -> AsyncIterator[GrpcTarget]:
    target = GrpcTarget(f"127.0.0.1:{server.port}")
    yield target
    await target.close()


async def test_grpc_reports_its_model(over_grpc: GrpcTarget, cluster: ScriptedCluster) -> None:
    facts = await over_grpc.facts()
    assert (facts.name, facts.vocab_size, facts.max_model_len) == ("tiny", 500, 256)
    assert facts.special_token_ids == model_info(cluster.tokenizer).eos_token_ids


async def test_grpc_counts_tokens_and_takes_the_legs_from_the_timeline(
    over_grpc: GrpcTarget, cluster: ScriptedCluster, seen: Seen
) -> None:
    answer = await over_grpc.send(ASKED, seen)
    assert (
        sum(seen.numbers),
        answer.num_output_tokens,
        answer.num_prompt_tokens,
        answer.num_cached_tokens,
    ) == (4, 4, 3, 1)
    legs = answer.legs
    assert legs is not None
    assert (legs.queue_s, legs.first_token_s) == (pytest.approx(0.01), pytest.approx(0.04))
    assert (legs.worker_queue_s, legs.prefill_s) == (pytest.approx(0.001), pytest.approx(0.025))
    assert (legs.transfer_s, legs.exposed_s) == (pytest.approx(0.02), pytest.approx(0.005))
    (request,) = cluster.requests
    assert (list(request.prompt_token_ids), request.sampling.ignore_eos, request.sampling.temperature) == (
        [10, 11, 12],
        True,
        0,
    )


async def test_grpc_errors_are_classified_by_status(
    over_grpc: GrpcTarget, cluster: ScriptedCluster, seen: Seen
) -> None:
    cluster.refusal = QueueFull(8, 1.5)
    with pytest.raises(LoadRequestFailed) as failure:
        await over_grpc.send(ASKED, seen)
    assert failure.value.kind == "resource exhausted"
    assert "queued already" in failure.value.message


async def test_grpc_without_a_server_is_unavailable(seen: Seen, server: GatewayServer) -> None:
    await server.stop(0)
    target = GrpcTarget(f"127.0.0.1:{server.port}")
    for attempt in (target.facts(), target.send(ASKED, seen)):
        with pytest.raises(LoadRequestFailed) as failure:
            await attempt
        assert failure.value.kind == "unavailable"
    await target.close()


async def test_an_abandoned_grpc_request_is_cancelled_at_the_server(
    over_grpc: GrpcTarget, cluster: ScriptedCluster, seen: Seen
) -> None:
    cluster.hold_after = 1
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            await over_grpc.send(ASKED, lambda num_tokens: limit.reschedule(0.0))
    await cluster.all_closed.wait()


def test_legs_are_those_of_the_attempt_that_brought_the_first_token() -> None:
    lost = pb.Attempt(attempt=0, queued_s=0.0, dispatched_s=0.1)
    good = pb.Attempt(
        attempt=1, queued_s=0.5, dispatched_s=0.6, first_token_s=0.9, prefill=pb.PrefillLeg(queue_s=0.1)
    )
    legs = legs_of(pb.Timeline(attempts=[lost, good]))
    assert legs is not None
    assert (legs.queue_s, legs.worker_queue_s, legs.prefill_s, legs.transfer_s) == (
        0.6,
        pytest.approx(0.1),
        None,
        None,
    )
    assert legs_of(pb.Timeline(attempts=[lost])) is None


class OpenAiServer:
    """`answer` makes the response to each completion."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[], Response] = lambda: events(chunk("a"), chunk("b", "stop"), DONE)
        self.address = ""
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.completions)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "small", "max_model_len": 64}, {"id": "large"}]}

    async def completions(self, request: HttpRequest) -> Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        return self.answer()


def events(*pieces: bytes) -> Response:
    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return StreamingResponse(body(), media_type="text/event-stream")


def chunk(
    text: str, finish_reason: str | None = None, usage: dict[str, Any] | None = None, **choice: Any
) -> bytes:
    choices = [{"index": 0, "text": text, "finish_reason": finish_reason, **choice}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}, ensure_ascii=False).encode() + b"\n\n"


def usage_chunk(**usage: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


@pytest.fixture
async def openai() -> AsyncIterator[OpenAiServer]:
    fake = OpenAiServer()
    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="error", lifespan="off", ws="none"))
    started = asyncio.Event()
    startup = server.startup

    async def start(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = start
    task = asyncio.create_task(server.serve())
    await started.wait()
    fake.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield fake
    server.should_exit = True
    await task


@pytest.fixture
async def over_http(openai: OpenAiServer) -> AsyncIterator[HttpTarget]:
    target = HttpTarget(openai.address + "/v1/", api_key="secret", extra={"min_tokens": 2})
    yield target
    await target.close()


async def test_http_asks_for_a_stream_of_the_first_model(
    over_http: HttpTarget, openai: OpenAiServer, seen: Seen
) -> None:
    facts = await over_http.facts()
    assert (facts.name, facts.vocab_size, facts.max_model_len) == ("small", None, 64)
    await over_http.send(ASKED, seen)
    (body,) = openai.bodies
    assert body == {
        "model": "small", "prompt": [10, 11, 12], "max_tokens": 4, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "min_tokens": 2,
    }  # fmt: skip
    assert openai.headers[0]["authorization"] == "Bearer secret"


async def test_http_takes_the_model_that_was_named(openai: OpenAiServer) -> None:
    target, other = HttpTarget(openai.address, "large"), HttpTarget(openai.address, "huge")
    assert (await target.facts()).name == "large"
    with pytest.raises(LoadRequestFailed, match="no model 'huge'"):
        await other.facts()
    await target.close()
    await other.close()


@pytest.mark.parametrize(
    ("pieces", "numbers", "totals"),
    [
        # a chunk is a token, also one whose text is not there yet; one that only ends the stream is none
        ([chunk("a"), chunk(""), chunk("ü"), chunk("", "length"), DONE], [1, 1, 1], (3, 3, None)),
        ([chunk("a"), chunk("b", "length"), DONE], [1, 1], (3, 2, None)),
        # token ids give the number
        (
            [
                chunk("abc", token_ids=[1, 2, 3]),
                chunk("", token_ids=[]),
                chunk("", "length", token_ids=[4]),
                DONE,
            ],
            [3, 1],
            (3, 4, None),
        ),
        # and so does usage that goes on
        (
            [
                chunk("a", usage={"completion_tokens": 1}),
                chunk("bc", "stop", usage={"completion_tokens": 3}),
                DONE,
            ],
            [1, 2],
            (3, 3, None),
        ),
        # totals are the server's, if it reports them
        (
            [
                chunk("ab", "length"),
                usage_chunk(prompt_tokens=5, completion_tokens=4, prompt_tokens_details={"cached_tokens": 2}),
                DONE,
            ],
            [1],
            (5, 4, 2),
        ),
        # neither [DONE] nor its blank line is needed when the choice has ended
        ([chunk("a", "stop")], [1], (3, 1, None)),
        ([chunk("a"), b"data: [DONE]"], [1], (3, 1, None)),
        (
            [b": ping\n\n", chunk("a")[:9], chunk("a")[9:], b"\n", chunk("b", "stop"), DONE],
            [1, 1],
            (3, 2, None),
        ),
    ],
)
async def test_http_counts_the_tokens_that_chunks_report(
    over_http: HttpTarget,
    openai: OpenAiServer,
    seen: Seen,
    pieces: list[bytes],
    numbers: list[int],
    totals: tuple[Any, ...],
) -> None:
    openai.answer = lambda: events(*pieces)
    answer = await over_http.send(ASKED, seen)
    assert seen.numbers == numbers
    assert (answer.num_prompt_tokens, answer.num_output_tokens, answer.num_cached_tokens) == totals


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        (lambda: JSONResponse({"error": {"message": "busy"}}, 429), "http 429", "busy"),
        (lambda: PlainTextResponse("oh no", 500), "http 500", "oh no"),
        (
            lambda: events(chunk("a"), b'data: {"error": {"message": "lost"}}\n\n'),
            "error in the stream",
            "lost",
        ),
        (lambda: events(chunk("a")), "cut off", "without its ending"),
        (lambda: events(b"data: {nonsense\n\n"), "bad answer", "nonsense"),
        (lambda: events(), "cut off", "without its ending"),
    ],
)
async def test_http_failures_are_classified_by_kind(
    over_http: HttpTarget,
    openai: OpenAiServer,
    seen: Seen,
    response: Callable[[], Response],
    kind: str,
    message: str,
) -> None:
    openai.answer = response
    with pytest.raises(LoadRequestFailed) as failure:
        await over_http.send(ASKED, seen)
    assert failure.value.kind == kind
    assert message in failure.value.message


async def test_http_without_a_server_is_unreachable(seen: Seen) -> None:
    target = HttpTarget("http://127.0.0.1:1")
    for attempt in (target.facts(), target.send(ASKED, seen)):
        with pytest.raises(LoadRequestFailed) as failure:
            await attempt
        assert failure.value.kind == "unreachable"
    await target.close()
