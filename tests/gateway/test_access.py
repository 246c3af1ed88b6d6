"""The gRPC server with keys: which calls need which, and the effects of a key's name."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

ALICE, BOB, ROOT = new_key(), new_key(), new_key()
Metadata = tuple[tuple[str, str], ...]


def as_key(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


@pytest.fixture
async def server(cluster: ScriptedCluster, tmp_path: Path) -> AsyncIterator[GatewayServer]:
    keys = [
        make_key("alice", ALICE, requests_per_minute=3, tokens_per_minute=150),
        make_key("bob", BOB),
        make_key("root", ROOT, is_admin=True),
    ]
    path = tmp_path / "keys"
    path.write_text("".join(f"{key.line}\n" for key in keys))
    path.chmod(0o600)
    config = CONFIG.model_copy(update={"listen": CONFIG.listen.model_copy(update={"api_keys": str(path)})})
    local = f"unix:{tmp_path}/socket"
    gateway = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer), local=local)
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def local(
    server: GatewayServer, tmp_path: Path
) -> AsyncIterator["pdserve_pb2_grpc.GenerationAsyncStub"]:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        yield pdserve_pb2_grpc.GenerationStub(channel)


@pytest.fixture
def admin(channel: grpc.aio.Channel) -> "pdserve_pb2_grpc.ClusterAsyncStub":
    """Connects over TCP."""
    return pdserve_pb2_grpc.ClusterStub(channel)


def request(max_tokens: int = 2, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=pb.Prompt(text="the dog"), sampling=pb.SamplingParams(max_tokens=max_tokens), **fields
    )


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    async def end() -> None:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end()
    return caught.value


async def test_every_call_except_a_health_check_needs_a_key(
    server: GatewayServer, channel: grpc.aio.Channel
) -> None:
    generation, admin = pdserve_pb2_grpc.GenerationStub(channel), pdserve_pb2_grpc.ClusterStub(channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    calls = [
        generation.Generate(request()),
        generation.GenerateStream(request()),
        generation.Tokenize(pb.TokenizeRequest()),
        generation.Detokenize(pb.DetokenizeRequest()),
        generation.GetModelInfo(pb.GetModelInfoRequest()),
        admin.GetStatus(pb.GetStatusRequest()),
        admin.WatchStatus(pb.WatchStatusRequest()),
        admin.Apply(pb.ApplyRequest()),
        admin.Scale(pb.ScaleRequest()),
        admin.Planner(pb.PlannerRequest()),
        admin.Drain(pb.DrainRequest()),
        reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])),
        channel.unary_unary("/no.such.Service/Method", None, None)(b""),
    ]
    for call in calls:
        assert (await refusal(call)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status


async def test_a_health_method_that_the_library_lacks_logs_no_line(
    server: GatewayServer, channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    listed = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    assert (await refusal(listed)).code() is grpc.StatusCode.UNIMPLEMENTED
    assert caplog.records == []


async def test_every_own_method_requires_a_key(server: GatewayServer, channel: grpc.aio.Channel) -> None:
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            call = channel.unary_unary(f"/{service.full_name}/{method.name}", None, None)
            assert (await refusal(call(b""))).code() is grpc.StatusCode.UNAUTHENTICATED, method.full_name


async def test_a_keyless_client_is_refused_before_its_message_is_read(
    server: GatewayServer, channel: grpc.aio.Channel
) -> None:
    """The stream's messages never arrive, and the answer does."""
    never = asyncio.Event()

    async def messages() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    call = channel.stream_unary("/pdserve.v1.Generation/Generate", None, None)(messages())
    assert (await refusal(call)).code() is grpc.StatusCode.UNAUTHENTICATED
    never.set()


async def test_only_a_marked_key_administers(admin: "pdserve_pb2_grpc.ClusterAsyncStub") -> None:
    assert (
        await refusal(admin.GetStatus(pb.GetStatusRequest(), metadata=as_key(BOB)))
    ).code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await admin.GetStatus(pb.GetStatusRequest(), metadata=as_key(ROOT))).model == "tiny"


async def test_clients_take_turns_by_key_name_not_by_client_id(
    cluster: ScriptedCluster,
    generation: "pdserve_pb2_grpc.GenerationAsyncStub",
    local: "pdserve_pb2_grpc.GenerationAsyncStub",
) -> None:
    for client_id in ("", "key:bob", "bob", "another"):
        await generation.Generate(request(client_id=client_id, request_id=client_id), metadata=as_key(ROOT))
    await generation.Generate(request(client_id="root"), metadata=as_key(BOB))
    await local.Generate(request(client_id="root"))
    assert [made.client for made in cluster.requests] == ["key:root"] * 4 + ["key:bob", "address:unix"]
    assert [made.user for made in cluster.requests] == ["", "key:bob", "bob", "another", "root", "root"]


async def test_clients_of_two_keys_may_choose_the_same_request_id(
    cluster: ScriptedCluster, generation: "pdserve_pb2_grpc.GenerationAsyncStub"
) -> None:
    """No client can take another's id, nor resume another's stream."""
    for key in (ALICE, BOB):
        answer = await generation.Generate(request(request_id="mine"), metadata=as_key(key))
        assert answer.request_id == "mine"
    assert [made.request_id for made in cluster.requests] == ["alice/mine", "bob/mine"]
    first, second = cluster.requests
    assert first.sampling.seed == second.sampling.seed


@pytest.mark.usefixtures("standing_rates")
async def test_an_exhausted_rate_is_reported_with_the_retry_delay(
    generation: "pdserve_pb2_grpc.GenerationAsyncStub",
    details: Callable[[grpc.aio.AioRpcError], dict[str, Any]],
) -> None:
    for _ in range(2):
        await generation.Generate(request(), metadata=as_key(ALICE))
    error = await refusal(generation.Generate(request(max_tokens=150), metadata=as_key(ALICE)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["ErrorInfo"].metadata["limit"] == "tokens_per_minute"
    error = await refusal(generation.Generate(request(), metadata=as_key(ALICE)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["ErrorInfo"].reason == "RATE_LIMITED"
    assert details(error)["ErrorInfo"].metadata["limit"] == "requests_per_minute"
    assert 0 < details(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() <= 20
    await generation.Generate(request(), metadata=as_key(BOB))
