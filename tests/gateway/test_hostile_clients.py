"""Attacks known from other servers have no effect on other clients here, and get a refusal that states the
reason."""

import asyncio
import socket
from contextlib import suppress
from typing import Any, TypeAlias

import grpc
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pdserve.core.config import LimitsSection
from pdserve.core.errors import InvalidRequest
from pdserve.gateway import app
from pdserve.gateway.app import GatewayServer
from pdserve.gateway.intake import Intake
from pdserve.gateway.translate import UnknownModel
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.support import ScriptedCluster, Unchecked, byte_level, model_info

Stub: TypeAlias = "pdserve_pb2_grpc.GenerationAsyncStub"
TEXT = pb.Prompt(text="hello")


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def still_serves(stub: Stub) -> bool:
    answer = await stub.Generate(pb.GenerateRequest(prompt=TEXT, sampling=pb.SamplingParams(max_tokens=1)))
    return len(answer.choices) == 1


@pytest.mark.parametrize("field", ["request_id", "client_id", "cache_salt"])
@pytest.mark.parametrize(
    "forged", ["a\nINFO all is well", "a\r", "\x1b[2Jgone", "a\x00b", "\u202eabc", "a\u2028b", "\x7f", "a\tb"]
)
async def test_names_that_would_forge_log_lines_are_refused(
    generation: Stub, cluster: ScriptedCluster, caplog: pytest.LogCaptureFixture, field: str, forged: str
) -> None:
    names: dict[str, Any] = {field: forged}
    error = await refusal(generation.Generate(pb.GenerateRequest(prompt=TEXT, **names)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"{field}: ") and (error.details() or "").isprintable()
    assert cluster.requests == [] and forged not in caplog.text


async def test_a_file_name_cannot_forge_the_lines_of_an_error(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub",
) -> None:
    error = await refusal(admin.Apply(pb.ApplyRequest(config_yaml="x", filename="a\nb")))
    assert (error.details() or "").startswith("filename: ")


@pytest.mark.parametrize("n", [17, 10**6, 2**31 - 1])
async def test_a_bomb_of_choices_is_refused_before_it_takes_memory(
    generation: Stub, cluster: ScriptedCluster, n: int
) -> None:
    error = await refusal(
        generation.Generate(pb.GenerateRequest(prompt=TEXT, sampling=pb.SamplingParams(n=n)))
    )
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and (error.details() or "").startswith("n: ")
    assert cluster.requests == []


UNREADABLE = {
    "no field": b"\xff" * 20,
    "a length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
    "no UTF-8": b"\x0a\x02\xff\xfe",
    "groups without an end": b"\x0b" * 5000,
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("method", ["Generation/Generate", "Generation/GenerateStream", "Cluster/Apply"])
async def test_malformed_bytes_are_the_clients_error(
    local_channel: grpc.aio.Channel,
    generation: Stub,
    caplog: pytest.LogCaptureFixture,
    method: str,
    what: str,
) -> None:
    error = await refusal(local_channel.unary_unary(f"/pdserve.v1.{method}", None, None)(UNREADABLE[what]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "protobuf" in (error.details() or "")
    assert "Traceback" not in caplog.text
    assert await still_serves(generation)


def bombs() -> dict[str, pb.GenerateRequest]:
    """Small to send, expensive to examine part by part."""
    messages = [pb.ChatMessage(role="u")] * 10_001
    return {
        "messages": pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat(messages=messages))),
        "stop": pb.GenerateRequest(prompt=TEXT, sampling=pb.SamplingParams(stop=["a"] * 10_001)),
        "resume_from": pb.GenerateRequest(prompt=TEXT, request_id="r", resume_from=[0] * 10_001),
        "prompt": pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[0] * 90_000))),
        "stop_token_ids": pb.GenerateRequest(
            prompt=TEXT, sampling=pb.SamplingParams(stop_token_ids=[0] * 1025)
        ),
    }


@pytest.mark.parametrize("field", bombs())
async def test_excessive_items_are_refused_by_their_number(
    generation: Stub, cluster: ScriptedCluster, field: str
) -> None:
    error = await refusal(anext(aiter(generation.GenerateStream(bombs()[field]))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"{field}: ") and "at most" in (error.details() or "")
    assert cluster.requests == []


async def test_an_oversized_configuration_is_refused(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub",
) -> None:
    error = await refusal(admin.Apply(pb.ApplyRequest(config_yaml="[" * 70_000)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and (error.details() or "").startswith(
        "config_yaml: "
    )


@pytest.mark.parametrize(
    "text", ["[" * 60_000, "a: &a [1]\nb: [" + "*a," * 15_000 + "]", "{" * 60_000, "- " * 30_000]
)
async def test_a_configuration_that_is_deep_or_grows_is_refused(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub", text: str
) -> None:
    error = await refusal(admin.Apply(pb.ApplyRequest(config_yaml=text)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_silent_connection_is_closed(
    cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gateway.conftest import CONFIG

    monkeypatch.setattr(app, "HANDSHAKE_TIMEOUT_MS", 300)
    server = await app.serve(cluster, CONFIG, cluster.tokenizer, model_info(cluster.tokenizer))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.timeout(60):
            await reader.read()
        writer.close()
    finally:
        await server.stop(0)


async def test_a_peer_that_does_not_speak_http2_is_disconnected(
    server: GatewayServer, generation: Stub
) -> None:
    for said in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + bytes(64),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(said)
    assert await still_serves(generation)


class Loose:
    """One for all examples: it has no state."""

    tokenizer = byte_level()
    intake = Intake(tokenizer, model_info(tokenizer), Unchecked())


@given(st.binary(max_size=200))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_whatever_bytes_parse_as_a_request_become_one_or_are_refused(data: bytes) -> None:
    async def receive() -> None:
        intake, limits = Loose.intake, LimitsSection()
        message = await intake.offload.message(pb.GenerateRequest, data, limits, "client")
        assert isinstance(message, pb.GenerateRequest)
        await intake.request(message, limits, None, "peer")

    with suppress(InvalidRequest, UnknownModel):
        asyncio.run(receive())
