"""Floods that never appear as calls: calls that the gRPC library refuses by itself, and data left by
disconnected clients."""

import asyncio
import errno
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdserve.gateway import connections
from pdserve.gateway.app import LOOKAHEAD_BYTES
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.gateway.connections import GrpcConnections
from pdserve.gateway.grpc.auth_interceptor import AuthInterceptor
from pdserve.gateway.grpc.sockets import GrpcSockets
from pdserve.gateway.grpc.unauthenticated_traffic import (
    MAX_BYTES,
    WINDOW_S,
    Received,
    UnauthenticatedTraffic,
    Verdict,
)
from pdserve.gateway.places import connection_name
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.deadlines import WAIT_S
from tests.gateway.flooding import PREFACE, as_key, connect, request, serving, until, until_closed
from tests.gateway.support import ScriptedCluster
from tests.gateway.test_unauthenticated_calls import (
    END_HEADERS,
    HEADERS_FRAME,
    SETTINGS_FRAME,
    frame,
    literal,
)

KEY = new_key()
END_STREAM = 1
MUCH = MAX_BYTES + 1


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "keys"
    path.write_text(f"{make_key('alice', KEY).line}\n")
    path.chmod(0o600)
    return {"api_keys": str(path)}


# the decision


class Looks:
    """Scans connections that have received this many bytes."""

    def __init__(self, *in_use: str) -> None:
        self.traffic = UnauthenticatedTraffic()
        self._in_use = in_use

    def __call__(
        self, now_s: float, num_bytes: Mapping[str, int], left: tuple[str, ...] = (), num_unread: int = 0
    ) -> Verdict:
        received = {name: Received(count, num_unread, name in left) for name, count in num_bytes.items()}
        return self.traffic.judge(received, self._in_use.__contains__, now_s)


def test_much_data_without_a_call_closes_at_the_second_scan() -> None:
    look = Looks()
    assert look(0.0, {"a": MUCH, "b": MAX_BYTES}) == Verdict(set(), set(), is_suspicious=True)
    assert look(0.1, {"a": MUCH + 1, "b": MAX_BYTES}) == Verdict({"a"}, set(), is_suspicious=True)
    assert look(0.2, {"b": MAX_BYTES}) == Verdict(set(), set(), is_suspicious=False)


def test_a_connection_with_all_bytes_parsed_may_wait_for_its_calls() -> None:
    look = Looks()
    for now_s in (0.0, 0.1, 0.2):
        assert look(now_s, {"a": 8 * MUCH}) == Verdict(set(), set(), is_suspicious=True)
    assert look(0.3, {"a": 8 * MUCH + 1}).too_much == {"a"}, "and now more"
    look = Looks()
    look(0.0, {"a": MUCH}, num_unread=MUCH)
    assert look(0.1, {"a": MUCH}, num_unread=1).too_much == {"a"}, "what came at once is being parsed still"


def test_a_disconnected_client_is_not_waited_for() -> None:
    verdict = Looks()(0.0, {"a": 10, "b": 10, "c": MUCH}, left=("b", "c"))
    assert verdict == Verdict({"c"}, {"b", "c"}, is_suspicious=True)


def test_calls_with_a_key_exempt_their_connection() -> None:
    look = Looks("busy")
    look.traffic.note_authenticated("short")
    for now_s in (0.0, 0.1, 0.2):
        verdict = look(now_s, {"busy": 1 << 30, "short": 1 << 30}, left=("busy", "short"))
        assert verdict == Verdict(set(), set(), is_suspicious=False)


def test_a_call_exempts_its_window_and_the_next() -> None:
    look = Looks()
    look(0.0, {"a": 0})
    look.traffic.note_authenticated("a")
    assert not look(WINDOW_S, {"a": MUCH}).is_suspicious
    assert not look(2 * WINDOW_S, {"a": MUCH}).is_suspicious, "sent while authenticated"
    assert look(2 * WINDOW_S + 1, {"a": 2 * MUCH}).is_suspicious


def test_bytes_count_by_window_and_connection() -> None:
    look = Looks()
    for window in range(5):
        assert not look(window * WINDOW_S, {"a": window * MAX_BYTES}).is_suspicious
    look(5 * WINDOW_S, {})
    assert not look(5 * WINDOW_S + 1, {"a": MAX_BYTES}).is_suspicious, "another connection of the same name"
    assert look(5 * WINDOW_S + 2, {"a": MUCH}).is_suspicious


# the kernel's side


@pytest.mark.parametrize("has_left", [False, True])
def test_an_aborted_connection_has_nothing_left_to_read(has_left: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sockets = GrpcSockets(listener.getsockname()[1])
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as server:
            name = connection_name(*client.getsockname())
            client.sendall(bytes(50_000))
            if has_left:
                client.shutdown(socket.SHUT_WR)
            found = sockets.look()
            assert found.keys() == {name}, "neither the listener nor the client's side"
            received = found[name].received
            assert received is not None and received.has_left == has_left
            assert received.num_unread == 50_000 <= received.num_bytes
            found[name].abort()
            with pytest.raises(ConnectionResetError):
                server.recv(1)
            with pytest.raises(OSError) as caught:
                server.recv(1)
            assert caught.value.errno == errno.ENOTCONN


def test_data_of_a_reset_connection_is_dropped_by_the_scan() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sockets = GrpcSockets(listener.getsockname()[1])
        client = socket.create_connection(listener.getsockname())
        with listener.accept()[0] as server:
            server.sendall(b"unread")
            client.sendall(bytes(50_000))
            assert client.recv(1, socket.MSG_PEEK)
            client.close()  # unread data causes a reset
            assert sockets.look() == {} and sockets.num_reset == 1
            with pytest.raises(OSError):
                server.recv(1)


def test_a_reused_descriptor_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sockets = GrpcSockets(listener.getsockname()[1])
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as old:
            (connection,) = sockets.look().values()
            with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as new:
                number = old.detach()
                socket.close(number)
                connection.abort()  # not open
                moved = socket.socket(fileno=socket.dup(new.fileno()))
                assert moved.fileno() == number, "the lowest that is free"
                connection.abort()
                client.sendall(b"x")
                assert moved.recv(1) == b"x"
                moved.close()


# with a server


def refused_calls() -> Iterator[bytes]:
    """Sends endless calls of few bytes each from one header table. The library refuses most of them: no
    SETTINGS are acknowledged."""
    names = {b":method": b"POST", b":scheme": b"http", b":path": b"/a.B/C", b":authority": b"x"}
    names |= {b"te": b"trailers", b"content-type": b"application/grpc"}
    block = b"".join(literal(name, value, True) for name, value in names.items())
    again = bytes(0x80 | 62 + index for index in reversed(range(len(names))))
    yield (
        PREFACE + frame(SETTINGS_FRAME, 0, 0, b"") + frame(HEADERS_FRAME, END_HEADERS | END_STREAM, 1, block)
    )
    for first in count(3, 2000):
        yield b"".join(
            frame(HEADERS_FRAME, END_HEADERS | END_STREAM, first + 2 * index, again) for index in range(1000)
        )


async def test_a_flood_of_calls_that_the_library_refuses_ends_its_connection(
    cluster: ScriptedCluster, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the calls that are seen do not end it
    monkeypatch.setattr("pdserve.gateway.grpc.unauthenticated_traffic.MAX_CALLS", 1 << 30)
    async with serving(cluster, keys) as server:
        ((reader, writer),) = await connect(server.grpc_address, 1)
        closed = asyncio.create_task(until_closed(reader))
        async with asyncio.timeout(WAIT_S):
            with suppress(ConnectionError):
                for calls in refused_calls():
                    writer.write(calls)
                    await writer.drain()
            await closed
        writer.transport.abort()
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            answer = await pdserve_pb2_grpc.GenerationStub(channel).Generate(request(), metadata=as_key(KEY))
            assert len(answer.choices) == 1


async def test_large_messages_of_calls_with_a_key_keep_their_connection(
    cluster: ScriptedCluster, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many on one new connection, with continuous scans."""
    monkeypatch.setattr(connections, "QUIET_S", 0.0)
    monkeypatch.setattr(connections, "BUSY_SHARE", 1.0)
    message = pb.TokenizeRequest(prompt=pb.Prompt(text="hello " * 20_000))
    async with serving(cluster, keys) as server:
        for _ in range(3):
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                stub = pdserve_pb2_grpc.GenerationStub(channel)
                calls = (_status(stub.Tokenize(message, metadata=as_key(KEY))) for _ in range(8))
                assert grpc.StatusCode.UNAVAILABLE not in await asyncio.gather(*calls)


async def test_large_messages_whose_calls_wait_to_be_seen_keep_their_connection(
    cluster: ScriptedCluster, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is blocked while a new client sends as much as it may."""
    seen = asyncio.Event()
    intercept = AuthInterceptor.intercept_service

    async def wait_to_intercept(self: AuthInterceptor, *arguments: Any) -> Any:
        await seen.wait()
        return await intercept(self, *arguments)

    monkeypatch.setattr(AuthInterceptor, "intercept_service", wait_to_intercept)
    monkeypatch.setattr(GrpcConnections, "start", lambda self, port: None)
    message = pb.TokenizeRequest(prompt=pb.Prompt(text="hello " * 16_000))
    async with serving(cluster, keys) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        sockets, watching = GrpcSockets(server.port), server._connections
        stub = pdserve_pb2_grpc.GenerationStub(channel)
        calls = [asyncio.create_task(_status(stub.Tokenize(message, metadata=as_key(KEY)))) for _ in range(8)]
        counts: list[int] = []
        await until(lambda: _rests(sockets, counts, 8 * LOOKAHEAD_BYTES))
        for _ in range(3):
            await watching._keep_bounds(sockets)
        seen.set()
        assert set(await asyncio.gather(*calls)) <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


def _rests(sockets: GrpcSockets, counts: list[int], min_bytes: int) -> bool:
    """Returns whether the one connection has received this much, and nothing more in the last scans, recorded
    in `counts`."""
    counts += [found.received.num_bytes for found in sockets.look().values() if found.received]
    return len(counts) > 20 and counts[-1] > min_bytes and len(set(counts[-20:])) == 1


async def _status(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
