"""Attacks that hold things open: connections, calls, bodies that never end. Those who hold less are served all the same."""

import asyncio
import os
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.core import peer_log
from pdserve.core.config_listen import TlsSection
from pdserve.gateway import call_bounds, connections
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.call_bounds import HeldBytes, KeylessCalls, PendingReads, TooManyBytes, TooSlow
from pdserve.gateway.connections import RESERVED_DESCRIPTORS, GrpcConnections, connections_of_each
from pdserve.gateway.http import server as http_server
from pdserve.gateway.keys import make_key, new_key
from pdserve.gateway.places import NoPlace
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.certificates import Authority
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

MALLORY, ALICE = new_key(), new_key()
WATCH = health_pb2.HealthCheckRequest()


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text="the dog"), sampling=pb.SamplingParams(max_tokens=2), **fields)


def as_key(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@asynccontextmanager
async def serving(
    cluster: ScriptedCluster, listen: dict[str, Any] | None = None, **limits: int
) -> AsyncIterator[GatewayServer]:
    changes = {"limits": CONFIG.limits.model_copy(update=limits), "listen": CONFIG.listen.model_copy(update=listen or {})}
    gateway = await serve(cluster, CONFIG.model_copy(update=changes), cluster.tokenizer, model_info(cluster.tokenizer))
    try:
        yield gateway
    finally:
        await gateway.stop(0)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "keys"
    path.write_text("".join(f"{make_key(name, key).line}\n" for name, key in (("mallory", MALLORY), ("alice", ALICE))))
    path.chmod(0o600)
    return {"api_keys": str(path)}


async def connect(address: str, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    return [await asyncio.open_connection(host, int(port)) for _ in range(count)]


async def first_to_end(opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> int:
    """Which connection is the first that its server closes."""
    reads = {asyncio.create_task(_until_closed(reader)): index for index, (reader, _) in enumerate(opened)}
    done, pending = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED, timeout=30)
    for task in pending:
        task.cancel()
    return min(reads[task] for task in done)


async def _until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1 << 16):
            pass
    except ConnectionError:
        pass


async def until(holds: Callable[[], bool]) -> None:
    loop, held = asyncio.get_running_loop(), asyncio.Event()

    def look() -> None:
        if holds():
            held.set()
        else:
            loop.call_soon(look)

    look()
    await asyncio.wait_for(held.wait(), 30)


def hang_up(opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    for _, writer in opened:
        writer.transport.abort()


# connections


async def test_idle_http_connections_make_room_for_newcomers(cluster: ScriptedCluster) -> None:
    async with serving(cluster, max_connections=16) as server:
        assert server.http_address is not None
        opened = await connect(server.http_address, 8)  # what one address may have
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False) as http:
            assert (await http.get("/livez")).status_code == 200
        assert await first_to_end(opened) == 0
        hang_up(opened)


async def test_http_streams_in_progress_keep_their_connections(cluster: ScriptedCluster) -> None:
    cluster.hold_after = 1
    async with serving(cluster, max_connections=16) as server:
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False) as http:
            answer = asyncio.create_task(http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2}))
            await cluster.held.wait()
            assert server.http_address is not None
            opened = await connect(server.http_address, 40)
            cluster.say_on.set()
            assert (await answer).json()["usage"]["completion_tokens"] == 2
        hang_up(opened)


async def test_tls_connections_that_never_speak_make_room(cluster: ScriptedCluster, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    tls = TlsSection(certificate=str(pair.certificate), key=str(pair.key))
    async with serving(cluster, {"tls": tls}, max_connections=16) as server:
        assert server.http_address is not None
        opened = await connect(server.http_address, 8)
        trusting = ssl.create_default_context(cafile=str(authority.certificate))
        async with httpx.AsyncClient(verify=trusting, trust_env=False) as http:
            assert (await http.get(f"https://{server.http_address}/livez")).status_code == 200
        assert await first_to_end(opened) == 0
        hang_up(opened)


async def test_grpc_connections_without_calls_make_room(cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with calls stay, however many come."""
    monkeypatch.setattr(connections, "QUIET_S", 0.01)
    monkeypatch.setattr(connections, "BUSY_S", 0.01)
    cluster.hold_after = 1
    async with serving(cluster, max_connections=16) as server:
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            answer = asyncio.create_task(_generate(channel))
            await cluster.held.wait()
            opened = await connect(server.grpc_address, 60)
            cluster.hold_after = None
            async with grpc.aio.insecure_channel(server.grpc_address) as another:
                assert len((await _generate(another)).choices) == 1
            cluster.say_on.set()
            assert len((await answer).choices) == 1
        hang_up(opened)


async def _generate(channel: grpc.aio.Channel) -> pb.GenerateResponse:
    answer: pb.GenerateResponse = await pdserve_pb2_grpc.GenerationStub(channel).Generate(request(), wait_for_ready=True)
    return answer


def test_workers_keep_descriptors_whatever_clients_open() -> None:
    assert connections_of_each(4096, 1 << 16) == 4096
    for num_descriptors in (1024, 2048, 4096):
        each = connections_of_each(4096, num_descriptors)
        assert each + each // 2 + each <= num_descriptors - RESERVED_DESCRIPTORS, "gRPC's with its slack, and HTTP's"


async def test_without_descriptors_accepting_pauses_and_says_so_once(
    cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "OUT_OF_DESCRIPTORS_S", 0.01)
    monkeypatch.setattr(peer_log._LIMIT, "_budget", peer_log.LineBudget())
    async with serving(cluster) as server:
        assert server._http is not None
        listener = _Exhausted(server._http._listener, 1)
        monkeypatch.setattr(server._http, "_listener", listener)
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False) as http:
            assert (await http.get("/livez")).status_code == 200
    assert caplog.text.count("cannot accept connections: Too many open files") == 1


class _Exhausted:
    """A listener that finds no descriptor for its first connections."""

    def __init__(self, listener: Any, times: int) -> None:
        self._listener, self._times = listener, times

    def accept(self) -> Any:
        self._times -= 1
        if self._times >= 0:
            raise OSError(24, "Too many open files")
        return self._listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


# calls


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_health_watches_of_one_connection_leave_room_for_calls(cluster: ScriptedCluster, keys: dict[str, Any]) -> None:
    async with serving(cluster, keys, max_open_calls=8) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        watches = [health_pb2_grpc.HealthStub(channel).Watch(WATCH) for _ in range(500)]
        answers = await asyncio.gather(*(anext(aiter(watch)) for watch in watches), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert len(refused) == 500 - KeylessCalls.MAX_OF_ONE_CONNECTION
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        async with grpc.aio.insecure_channel(server.grpc_address, (("grpc.use_local_subchannel_pool", 1),)) as another:
            assert (await health_pb2_grpc.HealthStub(another).Check(WATCH)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            stub = pdserve_pb2_grpc.GenerationStub(another)
            assert len((await stub.Generate(request(), metadata=as_key(ALICE))).choices) == 1
        for watch in watches:
            watch.cancel()


async def test_a_keyless_newcomer_takes_the_place_of_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = KeylessCalls()
    outcomes: list[str] = []

    async def watch(name: str) -> None:
        try:
            async with calls.enter("address:loopback", name):
                await asyncio.Event().wait()
        except Exception as error:
            outcomes.append(f"{name}: {error}")

    tasks = [asyncio.create_task(watch(str(index))) for index in range(KeylessCalls.MAX_OF_ONE_ADDRESS + 2)]
    await asyncio.wait(tasks[:2])
    assert [outcome.partition(":")[0] for outcome in outcomes] == ["0", "1"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(calls) == 0


async def test_no_key_takes_all_calls(
    cluster: ScriptedCluster, keys: dict[str, Any], details: Callable[[grpc.aio.AioRpcError], dict[str, Any]]
) -> None:
    """Calls whose message never comes are calls, too."""
    never = asyncio.Event()

    async def messages() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with serving(cluster, keys, max_open_calls=8) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        silent = [
            channel.stream_unary("/pdserve.v1.Generation/Generate")(messages(), metadata=as_key(MALLORY)) for _ in range(50)
        ]
        ends = asyncio.as_completed([asyncio.ensure_future(refusal(call)) for call in silent])
        for error in [await next(ends) for _ in range(46)]:
            assert details(error)["ErrorInfo"].reason == "TOO_MANY_CALLS"
        stub = pdserve_pb2_grpc.GenerationStub(channel)
        assert len((await stub.Generate(request(), metadata=as_key(ALICE))).choices) == 1
        for call in silent:
            call.cancel()
        never.set()


# bytes


@pytest.mark.parametrize("path", ["/health", "/livez", "/metrics", "/v1/models", "/nothing"])
async def test_a_body_that_nothing_takes_is_not_read(server: GatewayServer, path: str) -> None:
    (reader, writer), *_ = await connect(server.http_address or "", 1)
    writer.write(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999\r\n\r\n{{".encode())
    answer = await asyncio.wait_for(reader.read(), 30)  # to the end of the connection; the body never comes
    assert answer.split()[1] in (b"404", b"405")
    writer.close()


async def test_bodies_are_bounded_in_total_and_given_back(cluster: ScriptedCluster) -> None:
    async with serving(cluster, max_held_bytes=1 << 20) as server:
        assert server.http_address is not None
        opened = await connect(server.http_address, 2)
        for _, writer in opened:  # 90 KB each of the 128 KiB that one client may hold
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 95000\r\n\r\n" + b" " * 90_000)
        refused = await first_to_end(opened)
        hang_up([opened[1 - refused]])
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False) as http:
            while (answer := await http.post("/v1/completions", json={"prompt": "a" * 90_000})).status_code == 429:
                assert answer.json()["error"]["code"] == "too_many_bytes"
            assert answer.status_code == 400  # read, and refused for its length
        hang_up(opened)


def test_one_client_does_not_take_all_bytes() -> None:
    held = HeldBytes(1000)
    held.take("mallory", 250)
    with pytest.raises(TooManyBytes, match="messages of 250 bytes"):
        held.take("mallory", 1)
    for client in "abc":
        held.take(client, 250)
    with pytest.raises(TooManyBytes, match="messages of 1000 bytes"):
        held.take("d", 1)
    held.give_back("mallory", 250)
    held.take("d", 250)
    assert held.total == 1000


# messages that are being received


async def _receive(reads: PendingReads, client: str, came: asyncio.Event) -> str:
    try:
        async with reads.read(client):
            await came.wait()
    except (NoPlace, TooSlow) as error:
        return str(error)
    return "came"


async def test_slow_messages_are_bounded_and_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_bounds, "QUICK_S", 0.0)
    reads, came = PendingReads(8), asyncio.Event()
    many = [asyncio.create_task(_receive(reads, "mallory", came)) for _ in range(20)]
    others = [asyncio.create_task(_receive(reads, client, came)) for client in "abc"]
    await asyncio.wait(many[:18])
    assert len(reads) == 5, "two of eight for one client"
    assert "messages that come slowly" in many[0].result()
    came.set()
    assert set(await asyncio.gather(*many[18:], *others)) == {"came"}
    assert len(reads) == 0


async def test_a_message_that_comes_at_once_needs_no_place() -> None:
    reads, came = PendingReads(4), asyncio.Event()
    came.set()
    assert {await _receive(reads, "alice", came) for _ in range(100)} == {"came"}


async def test_a_message_that_never_comes_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_bounds, "MESSAGE_TIMEOUT_S", 0.01)
    assert await _receive(PendingReads(4), "alice", asyncio.Event()) == "the message did not come within 0.01 s"


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
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
GOAWAY = bytes([0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2])


async def test_frames_that_grpc_does_not_like_write_no_lines() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdin=pipe, stdout=pipe, stderr=pipe, env=env)
    assert process.stdout is not None
    while not (port := (await process.stdout.readline()).decode().strip()):
        pass  # a tokenizer that is trained prints empty lines
    address = f"127.0.0.1:{port}"
    for sent in (PREFACE + SETTINGS + GOAWAY, PREFACE + b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(64)):
        (reader, writer), *_ = await connect(address, 1)
        writer.write(sent)
        writer.write_eof()
        await _until_closed(reader)
        writer.close()
    _, lines = await process.communicate(b"")
    assert lines == b""


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.1.2.3:4567", "10.1.2.3"),
        ("ipv6:%5B2001:db8::1%5D:4567", "2001:db8::1"),
        ("http:10.1.2.3", "10.1.2.3"),
        ("http:2001:db8::1", "2001:db8::1"),
        ("unix:", "unix"),
    ],
)
def test_the_host_of_a_peer_is_found_whatever_its_server_calls_it(peer: str, host: str) -> None:
    assert call_bounds.host_of(peer) == host


async def test_reflection_takes_small_messages_alone(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    large = reflection_pb2.ServerReflectionRequest(file_by_filename="x" * 70_000)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(aiter(stub.ServerReflectionInfo(iter([large]))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    small = reflection_pb2.ServerReflectionRequest(list_services="")
    assert (await anext(aiter(stub.ServerReflectionInfo(iter([small]))))).list_services_response.service


# races


def test_a_connection_that_lost_its_place_gets_no_other_one() -> None:
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


async def test_the_watch_on_connections_outlives_errors(
    cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked = asyncio.Event()

    def listdir(path: str) -> list[str]:
        if caplog.records:
            looked.set()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(peer_log._LIMIT, "_budget", peer_log.LineBudget())
    monkeypatch.setattr(connections, "QUIET_S", 0.0)
    monkeypatch.setattr(connections.os, "listdir", listdir)
    async with serving(cluster):
        await asyncio.wait_for(looked.wait(), 30)
    assert "connections cannot be counted" in caplog.text


async def test_a_pipelined_request_keeps_its_connection(cluster: ScriptedCluster) -> None:
    """The request before it ends some turns after its own has begun."""
    cluster.hold_after = 1
    body = b'{"prompt": "hello", "max_tokens": 1}', b'{"prompt": "hello", "max_tokens": 2}'
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    async with serving(cluster, max_connections=16) as server:
        assert server.http_address is not None and server._http is not None
        ((reader, writer),) = await connect(server.http_address, 1)
        writer.write(b"".join((head % len(text)).encode() + text for text in body))
        await cluster.held.wait()
        opened = await connect(server.http_address, 20)
        await first_to_end(opened)
        cluster.say_on.set()
        answers = await asyncio.wait_for(reader.readuntil(b'"completion_tokens":2'), 30)
        assert answers.count(b"HTTP/1.1 200") == 2
        hang_up([(reader, writer), *opened])


async def test_an_http_server_that_stops_leaves_no_connection(cluster: ScriptedCluster) -> None:
    """Also one whose first byte has just come."""
    async with serving(cluster) as server:
        http = server._http
        assert http is not None
        opened = await connect(http.address, 2)
        await until(lambda: len(http._sockets) == 2)
        http._on_first_byte(next(iter(http._sockets)))
        await http.stop(0)
        assert not http._sockets and not len(http._places)
        hang_up(opened)


async def test_an_answer_that_is_not_read_ends(cluster: ScriptedCluster) -> None:
    """A client of HTTP/2 whose windows stay closed."""
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
        headers = b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields.items())
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
