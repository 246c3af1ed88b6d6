"""A real server on a free port, in front of a scripted cluster."""

from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import cast

import grpc
import httpx
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from pdserve.core.config import ClusterConfig
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth.rate_limit import TokenBucket
from pdserve.proto import pdserve_pb2_grpc
from tests.deadlines import WAIT_S
from tests.gateway.support import ScriptedCluster, byte_level, model_info

CONFIG = ClusterConfig.model_validate(
    {
        "listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"},
        "limits": {"max_message_bytes": 100_000, "max_tokens": 200, "max_n": 4},
        "model": {"path": "tiny"},
    }
)


@pytest.fixture
def standing_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is added to a key's quotas during a test, however long it takes."""
    monkeypatch.setattr(TokenBucket, "_fill", lambda bucket, now_s: None)


@pytest.fixture
def cluster() -> ScriptedCluster:
    return ScriptedCluster(byte_level())


@pytest.fixture
def local_address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/grpc.sock"


@pytest.fixture
async def server(cluster: ScriptedCluster, local_address: str) -> AsyncIterator[GatewayServer]:
    gateway = await serve(
        cluster, CONFIG, cluster.tokenizer, model_info(cluster.tokenizer), local=local_address
    )
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def channel(server: GatewayServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture
def generation(channel: grpc.aio.Channel) -> "pdserve_pb2_grpc.GenerationAsyncStub":
    return pdserve_pb2_grpc.GenerationStub(channel)


@pytest.fixture
async def http(server: GatewayServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}",
        verify=False,  # nothing is to be verified here, and reading authorities takes longer than a test
        trust_env=False,
        timeout=WAIT_S,
    ) as client:
        yield client


@pytest.fixture
async def local_channel(server: GatewayServer, local_address: str) -> AsyncIterator[grpc.aio.Channel]:
    """Connects as the user who started the server."""
    async with grpc.aio.insecure_channel(local_address) as channel:
        yield channel


@pytest.fixture
def admin(local_channel: grpc.aio.Channel) -> "pdserve_pb2_grpc.ClusterAsyncStub":
    return pdserve_pb2_grpc.ClusterStub(local_channel)


@pytest.fixture
def details() -> Callable[[grpc.aio.AioRpcError], dict[str, object]]:
    """Returns the google.rpc details of an error, by type name."""

    def unpack(error: grpc.aio.AioRpcError) -> dict[str, object]:
        metadata = dict(cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata()))
        packed = metadata["grpc-status-details-bin"]
        status = status_pb2.Status.FromString(packed)
        assert status.code == error.code().value[0]
        assert status.message == error.details()
        return {item.TypeName().rpartition(".")[2]: _unpacked(item) for item in status.details}

    return unpack


def _unpacked(item: AnyMessage) -> object:
    message = getattr(error_details_pb2, item.TypeName().rpartition(".")[2])()
    item.Unpack(message)
    return message
