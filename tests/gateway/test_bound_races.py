"""Bounds under races and floods: no place is kept once lost, nothing leaks, and no log line is written."""

import asyncio
import os
import sys
from unittest.mock import Mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.core import peer_log
from pdserve.gateway import connections
from pdserve.gateway.app import GatewayServer
from pdserve.gateway.connections import GrpcConnections
from pdserve.gateway.grpc.sockets import GrpcSocket, GrpcSockets
from pdserve.gateway.translate import ClientGone, translated
from pdserve.proto import pdserve_pb2 as pb
from tests.deadlines import WAIT_S
from tests.gateway.flooding import PREFACE, connect, first_to_end, hang_up, serving, until, until_closed
from tests.gateway.support import ScriptedCluster

WATCH = health_pb2.HealthCheckRequest()


# races


def test_a_connection_that_lost_its_place_gets_no_new_one() -> None:
    """The library may hold it for a while after it was shut down."""
    watched = GrpcConnections(16)  # 8 of one address
    found = {f"10.0.0.1 {port}": port for port in range(8)}
    assert watched.settle(found) == {}
    found["10.0.0.1 99"] = 99
    assert watched.settle(found) == {"10.0.0.1 0": 0}
    assert watched.settle(found) == {}
    del found["10.0.0.1 0"]
    assert watched.settle(found) == {} and len(watched.places) == 8
    watched.stop()


async def test_watching_connections_survives_errors(
    cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked = asyncio.Event()

    def look(sockets: GrpcSockets) -> dict[str, GrpcSocket]:
        if caplog.records:
            looked.set()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(peer_log._LIMIT, "_budget", peer_log.LineBudget())
    monkeypatch.setattr(connections, "QUIET_S", 0.0)
    monkeypatch.setattr(GrpcSockets, "look", look)
    async with serving(cluster):
        await asyncio.wait_for(looked.wait(), WAIT_S)
    assert "connections cannot be counted" in caplog.text


async def test_a_pipelined_request_keeps_its_connection(cluster: ScriptedCluster) -> None:
    """The previous request ends some turns after its own has begun."""
    cluster.hold_after = 1
    body = b'{"prompt": "hello", "max_tokens": 1}', b'{"prompt": "hello", "max_tokens": 2}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
        " application/json\r\ncontent-length: %d\r\n\r\n"
    )
    async with serving(cluster, max_connections=16) as server:
        assert server.http_address is not None and server._http is not None
        ((reader, writer),) = await connect(server.http_address, 1)
        writer.write(b"".join((head % len(text)).encode() + text for text in body))
        await cluster.held.wait()
        opened = await connect(server.http_address, 20)
        await first_to_end(opened)
        cluster.say_on.set()
        answers = await asyncio.wait_for(reader.readuntil(b'"completion_tokens":2'), WAIT_S)
        assert answers.count(b"HTTP/1.1 200") == 2
        hang_up([(reader, writer), *opened])


async def test_an_http_server_that_stops_leaves_no_connection(cluster: ScriptedCluster) -> None:
    """Includes one whose first byte has just arrived."""
    async with serving(cluster) as server:
        http = server._http
        assert http is not None
        opened = await connect(http.address, 2)
        await until(lambda: len(http._sockets) == 2)
        http._on_first_byte(next(iter(http._sockets)))
        await http.stop(0)
        assert not http._sockets and not len(http._places)
        hang_up(opened)


async def test_a_call_without_a_client_ends_without_a_status() -> None:
    """gRPC's library logs a traceback for a status beside a write that is pending, and sends one when a
    handler returns."""
    context = Mock(grpc.aio.ServicerContext)
    with pytest.raises(asyncio.CancelledError):
        async with translated(context):
            raise ClientGone
    context.abort.assert_not_called()


async def test_an_answer_that_is_not_read_ends(cluster: ScriptedCluster) -> None:
    """An HTTP/2 client whose flow-control windows stay closed."""
    async with serving(cluster, max_unread_s=0.05) as server:
        ((reader, writer),) = await connect(server.grpc_address, 1)
        closed_window = bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0])
        fields = {
            b":method": b"POST",
            b":scheme": b"http",
            b":path": b"/pdserve.v1.Generation/Tokenize",
            b":authority": b"x",
            b"te": b"trailers",
            b"content-type": b"application/grpc",
        }
        headers = b"".join(
            b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in fields.items()
        )
        message = pb.TokenizeRequest(prompt=pb.Prompt(text="hello")).SerializeToString()
        data = b"\x00" + len(message).to_bytes(4, "big") + message
        stream = (1).to_bytes(4, "big")
        writer.write(PREFACE + closed_window)
        writer.write(len(headers).to_bytes(3, "big") + b"\x01\x04" + stream + headers)
        writer.write(len(data).to_bytes(3, "big") + b"\x00\x01" + stream + data)
        await reader.read(1)
        uses = server._connections.places._num_uses
        await until(lambda: bool(uses))
        await until(lambda: not uses)
        hang_up([(reader, writer)])


async def test_the_user_who_runs_the_cluster_may_watch_its_health_often(
    server: GatewayServer, local_channel: grpc.aio.Channel
) -> None:
    watches = [health_pb2_grpc.HealthStub(local_channel).Watch(WATCH) for _ in range(20)]
    for watch in watches:
        await anext(aiter(watch))
        watch.cancel()


# lines that peers cause


SERVER = """
import asyncio, sys
from pdserve.gateway.app import serve
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, byte_level, model_info

async def main():
    cluster = ScriptedCluster(byte_level())
    server = await serve(cluster, CONFIG, cluster.tokenizer, model_info(cluster.tokenizer))
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)

asyncio.run(main())
"""
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
GOAWAY = bytes([0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2])


async def test_malformed_frames_log_no_lines() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, stdin=pipe, stdout=pipe, stderr=pipe, env=env
    )
    assert process.stdout is not None
    while not (port := (await process.stdout.readline()).decode().strip()):
        pass  # training a tokenizer prints empty lines
    address = f"127.0.0.1:{port}"
    for sent in (
        PREFACE + SETTINGS + GOAWAY,
        PREFACE + b"\xff" * 64,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01" + bytes(64),
    ):
        (reader, writer), *_ = await connect(address, 1)
        writer.write(sent)
        writer.write_eof()
        await until_closed(reader)
        writer.close()
    _, lines = await process.communicate(b"")
    assert lines == b""
