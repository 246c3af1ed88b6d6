"""Floods of gRPC calls that cost a client little: without a key, or with headers that refer to one
another."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.gateway.grpc import unauthenticated_traffic
from pdserve.gateway.grpc.auth_interceptor import MAX_HEADERS
from pdserve.gateway.grpc.unauthenticated_traffic import MAX_CALLS, WINDOW_S, UnauthenticatedTraffic
from pdserve.proto import pdserve_pb2_grpc
from tests.deadlines import WAIT_S
from tests.gateway.flooding import PREFACE, as_key, connect, request, serving, until_closed
from tests.gateway.support import ScriptedCluster

KEY = new_key()
CHECK = health_pb2.HealthCheckRequest()
HEADERS_FRAME, SETTINGS_FRAME, END_HEADERS = 1, 4, 4
ADDED_ENTRY = b"\xbe"  # HPACK: the newest entry of the dynamic table


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "keys"
    path.write_text(f"{make_key('alice', KEY).line}\n")
    path.chmod(0o600)
    return {"api_keys": str(path)}


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def literal(name: bytes, value: bytes, is_indexed: bool = False) -> bytes:
    assert len(name) < 127 and len(value) < 127
    return bytes([0x40 if is_indexed else 0, len(name)]) + name + bytes([len(value)]) + value


def bomb(stream: int, num_references: int) -> bytes:
    """Returns one call whose headers are `num_references` references, of a byte each, to one entry."""
    pseudo = {b":method": b"POST", b":scheme": b"http", b":path": b"/a.B/C", b":authority": b"localhost"}
    names = pseudo | {b"te": b"trailers", b"content-type": b"application/grpc"}
    block = b"".join(literal(name, value) for name, value in names.items())
    return frame(
        HEADERS_FRAME,
        END_HEADERS,
        stream,
        block + literal(b"x", b"y" * 100, True) + ADDED_ENTRY * num_references,
    )


async def test_a_call_with_very_many_headers_ends_its_connection(cluster: ScriptedCluster) -> None:
    async with serving(cluster) as server:
        ((reader, writer),) = await connect(server.grpc_address, 1)
        writer.write(PREFACE + frame(SETTINGS_FRAME, 0, 0, b"") + bomb(1, MAX_HEADERS))
        async with asyncio.timeout(WAIT_S):
            await until_closed(reader)
        writer.transport.abort()
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            assert len((await pdserve_pb2_grpc.GenerationStub(channel).Generate(request())).choices) == 1


async def test_a_usual_number_of_headers_is_accepted(cluster: ScriptedCluster) -> None:
    async with serving(cluster) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        extra = tuple((f"x-{index}", "a") for index in range(MAX_HEADERS - 28))
        assert (
            len((await pdserve_pb2_grpc.GenerationStub(channel).Generate(request(), metadata=extra)).choices)
            == 1
        )


async def test_very_many_calls_without_a_key_end_their_connection(
    cluster: ScriptedCluster, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unauthenticated_traffic, "MAX_CALLS", 50)
    async with serving(cluster, keys) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        closed = asyncio.Event()
        asyncio.get_running_loop().create_task(_watch_end(channel, closed))
        while not closed.is_set():
            with pytest.raises(grpc.aio.AioRpcError):
                await pdserve_pb2_grpc.GenerationStub(channel).Generate(request(), timeout=WAIT_S)


async def _watch_end(channel: grpc.aio.Channel, closed: asyncio.Event) -> None:
    """A health watch without a key ends only with its connection."""
    try:
        async for _ in health_pb2_grpc.HealthStub(channel).Watch(CHECK):
            pass
    except grpc.aio.AioRpcError:
        closed.set()


async def test_a_connection_with_an_authenticated_call_stays(
    cluster: ScriptedCluster, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a proxy's, and the calls without a key another client's."""
    monkeypatch.setattr(unauthenticated_traffic, "MAX_CALLS", 50)
    cluster.hold_after = 1
    async with serving(cluster, keys) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = pdserve_pb2_grpc.GenerationStub(channel)
        answer = asyncio.create_task(_with_key(stub))
        await cluster.held.wait()
        for _ in range(200):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        cluster.say_on.set()
        await answer


async def _with_key(stub: Any) -> None:
    assert len((await stub.Generate(request(), metadata=as_key(KEY))).choices) == 1


def test_calls_count_by_connection_and_window() -> None:
    calls = UnauthenticatedTraffic()
    assert not any(calls.add_call("a", 0.0) for _ in range(MAX_CALLS))
    assert not calls.add_call("b", 0.0)
    assert calls.add_call("a", WINDOW_S - 0.1)
    assert not calls.add_call("a", WINDOW_S)
