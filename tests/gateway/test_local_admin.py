"""The administrator of a server without keys: only the user who started it, over the Unix socket, unless a
flag says otherwise."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.gateway.app import GatewayServer, serve
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.certificates import Authority
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

CLUSTER = pb.DESCRIPTOR.services_by_name["Cluster"]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@asynccontextmanager
async def served(cluster: ScriptedCluster, **listen: object) -> AsyncIterator[GatewayServer]:
    settings = CONFIG.model_dump() | {"listen": CONFIG.listen.model_dump() | listen}
    gateway = await serve(
        cluster, CONFIG.model_validate(settings), cluster.tokenizer, model_info(cluster.tokenizer)
    )
    yield gateway
    await gateway.stop(0)


async def test_no_method_of_the_cluster_service_is_offered_over_tcp(
    server: GatewayServer, channel: grpc.aio.Channel, cluster: ScriptedCluster
) -> None:
    assert {method.name for method in CLUSTER.methods} >= {
        "GetStatus",
        "WatchStatus",
        "Apply",
        "Drain",
        "Explain",
    }
    for method in CLUSTER.methods:
        error = await refusal(channel.unary_unary(f"/{CLUSTER.full_name}/{method.name}", None, None)(b""))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED, method.name
        for part in ("over a Unix socket", "listen.api_keys", "listen.admin_without_key: true"):
            assert part in (error.details() or "")
    assert cluster.drained == []


async def test_the_refusal_does_not_wait_for_the_message(
    server: GatewayServer, channel: grpc.aio.Channel
) -> None:
    never = asyncio.Event()

    async def messages() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    call = channel.stream_unary(f"/{CLUSTER.full_name}/Apply", None, None)(messages())
    assert (await refusal(call)).code() is grpc.StatusCode.PERMISSION_DENIED
    never.set()


async def test_everything_else_is_offered_over_tcp_and_all_of_it_locally(
    channel: grpc.aio.Channel, admin: "pdserve_pb2_grpc.ClusterAsyncStub"
) -> None:
    assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status
    assert (
        await pdserve_pb2_grpc.GenerationStub(channel).GetModelInfo(pb.GetModelInfoRequest())
    ).name == "tiny"
    assert (await admin.GetStatus(pb.GetStatusRequest())).model == "tiny"


async def test_with_the_flag_any_client_of_the_port_administers(cluster: ScriptedCluster) -> None:
    async with (
        served(cluster, admin_without_key=True) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        assert (await pdserve_pb2_grpc.ClusterStub(channel).GetStatus(pb.GetStatusRequest())).model == "tiny"


async def test_a_clients_certificate_makes_no_administrator(cluster: ScriptedCluster, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    mine, client = authority.sign("server"), authority.sign("client")
    tls = {
        "certificate": str(mine.certificate),
        "key": str(mine.key),
        "client_ca": str(authority.certificate),
    }
    credentials = grpc.ssl_channel_credentials(
        authority.certificate.read_bytes(), client.key.read_bytes(), client.certificate.read_bytes()
    )
    async with (
        served(cluster, tls=tls) as server,
        grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel,
    ):
        error = await refusal(pdserve_pb2_grpc.ClusterStub(channel).GetStatus(pb.GetStatusRequest()))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
