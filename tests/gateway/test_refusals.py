"""Each kind of invalid request has its own status, message and details, and affects no other request."""

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
import pytest
from google.rpc import error_details_pb2

from pdserve.core.errors import (
    CapacityError,
    DuplicateRequest,
    NoWorkerAvailable,
    PdserveError,
    QueueFull,
    TokensTooSlow,
)
from pdserve.core.peer_log import BURST_LINES, LineBudget, RateLimit, failure_log
from pdserve.gateway import vetting
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.translate import MAX_MESSAGE_CHARS
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, byte_level, model_info, sentencepiece_like

Stub: TypeAlias = "pdserve_pb2_grpc.GenerationAsyncStub"
Details = Callable[[grpc.aio.AioRpcError], dict[str, object]]
TEXT = pb.Prompt(text="hello")


def ask(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=TEXT, sampling=pb.SamplingParams(**sampling))


def chat(*roles: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content="hi") for role in roles]
    return pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat(messages=messages)))


async def refusal(stub: Stub, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request)
    return caught.value


INVALID = {
    "no prompt": (pb.GenerateRequest(), "prompt", "one of text, chat or token_ids"),
    "empty text": (pb.GenerateRequest(prompt=pb.Prompt(text="")), "prompt.text", "not empty"),
    "no tokens": (
        pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds())),
        "prompt",
        "at least one token",
    ),
    "long prompt": (
        pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[5] * 256))),
        "prompt",
        "at most 255",
    ),
    "unknown token": (
        pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[5, 500]))),
        "prompt_token_ids[1]",
        "0 to 499",
    ),
    "no messages": (chat(), "prompt.chat.messages", "at least one message"),
    "no role": (chat(""), "prompt.chat.messages[0].role", "a role"),
    "template refuses": (chat("user", "system"), "prompt.chat", "system comes first"),
    "temperature": (ask(temperature=-0.5), "temperature", "0 to 100"),
    "not a number": (ask(temperature=float("nan")), "temperature", "0 to 100"),
    "max_tokens over the limit": (ask(max_tokens=201), "max_tokens", "1 to 200"),
    "no max_tokens": (ask(max_tokens=0), "max_tokens", "1 to 200"),
    "many choices": (ask(n=2**31 - 1), "n", "1 to 4"),
    "negative choices": (ask(n=-1), "n", "1 to 4"),
    "logprobs": (ask(logprobs=21), "logprobs", "0 to 20"),
    "prompt logprobs": (ask(prompt_logprobs=21), "prompt_logprobs", "0 to 20"),
    "bias out of range": (ask(logit_bias={7: 1.0, 9: -100.5}), "logit_bias[9]", "-100 to 100"),
    "bias of no token": (ask(logit_bias={500: 1.0}), "logit_bias", "token ids of 0 to 499"),
    "empty stop string": (ask(stop=["a", ""]), "stop[1]", "not empty"),
    "long stop string": (ask(stop=["a" * 1025]), "stop[0]", "at most 1024 characters"),
    "resumption of a whole answer": (
        pb.GenerateRequest(prompt=TEXT, request_id="x", resume_from=[1]),
        "resume_from",
        "the answer comes as a whole",
    ),
    "long request id": (
        pb.GenerateRequest(prompt=TEXT, request_id="x" * 129),
        "request_id",
        "at most 128 characters",
    ),
}


INVALID_RESUMPTIONS = {
    "nameless resumption": (
        pb.GenerateRequest(prompt=TEXT, resume_from=[1]),
        "request_id",
        "the request to resume",
    ),
    "resumption of other choices": (
        pb.GenerateRequest(prompt=TEXT, request_id="x", resume_from=[1, 1]),
        "resume_from",
        "one index for each of the 1 choices",
    ),
    "resumption after the end": (
        pb.GenerateRequest(prompt=TEXT, request_id="x", resume_from=[17]),
        "resume_from[0]",
        "0 to 16",
    ),
}


@pytest.mark.parametrize("name", INVALID_RESUMPTIONS)
async def test_an_invalid_resumption_is_refused_with_field_and_expectation(
    generation: Stub, name: str
) -> None:
    request, field, expected = INVALID_RESUMPTIONS[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(generation.GenerateStream(request)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "") and expected in (caught.value.details() or "")


@pytest.mark.parametrize("name", INVALID)
async def test_a_bad_field_is_named_in_message_and_details(
    generation: Stub, cluster: ScriptedCluster, details: Details, name: str
) -> None:
    request, field, expected = INVALID[name]
    error = await refusal(generation, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"{field}: ")
    bad = details(error)["BadRequest"]
    assert isinstance(bad, error_details_pb2.BadRequest)
    (violation,) = bad.field_violations
    assert violation.field == field
    assert expected in violation.description
    assert cluster.requests == []


async def test_an_unknown_sampling_field_is_refused_by_its_number(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    request = ask(temperature=0.5)
    request.sampling.MergeFromString(b"\x98\x06\x01")  # field 99, varint 1
    error = await refusal(generation, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (
        error.details()
        == "sampling: 'field 99' is not valid, expected only the fields of pdserve.v1.SamplingParams"
    )
    assert cluster.requests == []


async def test_unknown_fields_anywhere_in_a_request_are_refused(generation: Stub) -> None:
    request = chat("user")
    request.prompt.chat.messages[0].MergeFromString(b"\x98\x06\x01")
    assert "prompt.chat.messages[0]: 'field 99'" in ((await refusal(generation, request)).details() or "")
    request = pb.GenerateRequest(prompt=TEXT)
    request.MergeFromString(b"\x98\x06\x01")
    assert "GenerateRequest: 'field 99'" in ((await refusal(generation, request)).details() or "")


@pytest.mark.parametrize("num_fields", [2000, 30_000], ids=["in the head", "in the intake process"])
async def test_many_unknown_fields_are_refused_without_listing_them(
    generation: Stub, monkeypatch: pytest.MonkeyPatch, num_fields: int
) -> None:
    monkeypatch.setattr(vetting, "UnknownFieldSet", None)
    request = pb.GenerateRequest(prompt=TEXT)
    request.MergeFromString(b"\x98\x06\x01" * num_fields)
    error = await refusal(generation, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{3 * num_fields} bytes of unknown fields" in (error.details() or "")


async def test_another_model_is_not_found(generation: Stub, details: Details) -> None:
    error = await refusal(generation, pb.GenerateRequest(prompt=TEXT, model="gpt"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "model: 'gpt' is not served here, expected 'tiny'"
    info = details(error)["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, info.metadata["served"]) == ("UNKNOWN_MODEL", "pdserve", "tiny")


@pytest.mark.parametrize(
    ("refused", "code", "reason", "retry_s"),
    [
        (QueueFull(1024, 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 1.5),
        (TokensTooSlow(0.05, 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKENS_TOO_SLOW", 1.5),
        (DuplicateRequest("mine"), grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST", None),
        (NoWorkerAvailable("no worker is ready"), grpc.StatusCode.UNAVAILABLE, "NO_WORKER_AVAILABLE", 1.0),
    ],
)
async def test_router_refusals_have_their_status_and_retry_delay(
    generation: Stub,
    cluster: ScriptedCluster,
    details: Details,
    refused: PdserveError,
    code: grpc.StatusCode,
    reason: str,
    retry_s: float | None,
) -> None:
    cluster.refusal = refused
    error = await refusal(generation, ask())
    assert error.code() is code
    assert error.details() == str(refused)
    found = details(error)
    assert found["ErrorInfo"].reason == reason  # type: ignore[attr-defined]
    assert ("RetryInfo" in found) == (retry_s is not None)
    if retry_s is not None:
        assert found["RetryInfo"].retry_delay.ToNanoseconds() == retry_s * 1e9  # type: ignore[attr-defined]


async def test_an_internal_error_reveals_no_details_to_clients(
    generation: Stub, cluster: ScriptedCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.refusal = RuntimeError("a secret")  # type: ignore[assignment]
    error = await refusal(generation, ask())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert "a secret" in caplog.text


async def test_calls_that_fail_fill_no_log(
    generation: Stub,
    cluster: ScriptedCluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failure_log, "filters", [RateLimit(LineBudget())])
    cluster.refusal = RuntimeError("a bug")  # type: ignore[assignment]
    for _ in range(10 * BURST_LINES):
        await refusal(generation, ask())
    assert BURST_LINES <= len(caplog.records) < 5 * BURST_LINES


async def test_messages_over_the_limit_are_refused(generation: Stub, cluster: ScriptedCluster) -> None:
    error = await refusal(generation, pb.GenerateRequest(prompt=pb.Prompt(text="x" * 100_001)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert cluster.requests == []


async def test_a_refused_request_does_not_disturb_a_running_one(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    cluster.hold_after = 1
    call = aiter(generation.GenerateStream(ask(max_tokens=4)))
    await anext(call)
    await refusal(generation, ask(temperature=-1))
    cluster.say_on.set()
    assert [event async for event in call][-1].HasField("end")


async def test_chat_needs_a_template_in_the_checkpoint() -> None:
    tokenizer = sentencepiece_like()
    gateway = await serve(ScriptedCluster(tokenizer), CONFIG, tokenizer, model_info(tokenizer))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            stub: Stub = pdserve_pb2_grpc.GenerationStub(channel)
            error = await refusal(stub, chat("user"))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "the model has no chat template" in (error.details() or "")
    finally:
        await gateway.stop(0)


async def test_a_port_in_use_is_named(server: GatewayServer) -> None:
    from pdserve.core.errors import ConfigError

    tokenizer = byte_level()
    address = f"127.0.0.1:{server.port}"
    config = CONFIG.model_copy(update={"listen": CONFIG.listen.model_copy(update={"grpc": address})})
    with pytest.raises(ConfigError, match=f"listen.grpc: cannot listen on {address}"):
        await serve(ScriptedCluster(tokenizer), config, tokenizer, model_info(tokenizer))


async def test_long_messages_are_cut_to_what_headers_can_carry(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    cluster.refusal = CapacityError("x" * 100_000)
    error = await refusal(generation, ask())
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert len(error.details() or "") == MAX_MESSAGE_CHARS
    error = await refusal(generation, pb.GenerateRequest(prompt=TEXT, model="😀" * 10_000))
    assert error.code() is grpc.StatusCode.NOT_FOUND  # its characters are longer there
