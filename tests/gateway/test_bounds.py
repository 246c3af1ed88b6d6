"""Attacks that hold resources open: connections, calls, endless bodies. Clients that hold less are served all
the same."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
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
from pdserve.gateway.app import GatewayServer
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.gateway.call_bounds import KeylessCalls, OpenCalls, PendingReads, TooSlow
from pdserve.gateway.connections import RESERVED_DESCRIPTORS, connections_of_each
from pdserve.gateway.http import server as http_server
from pdserve.gateway.places import NoPlace
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.certificates import Authority
from tests.deadlines import WAIT_S
from tests.gateway.flooding import as_key, connect, first_to_end, hang_up, request, serving
from tests.gateway.support import ScriptedCluster

MALLORY, ALICE = new_key(), new_key()
WATCH = health_pb2.HealthCheckRequest()


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "keys"
    path.write_text(
        "".join(f"{make_key(name, key).line}\n" for name, key in (("mallory", MALLORY), ("alice", ALICE)))
    )
    path.chmod(0o600)
    return {"api_keys": str(path)}


# connections


async def test_idle_http_connections_make_room_for_newcomers(cluster: ScriptedCluster) -> None:
    async with serving(cluster, max_connections=16) as server:
        assert server.http_address is not None
        opened = await connect(server.http_address, 8)  # the bound of one address
        async with httpx.AsyncClient(
            base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
        ) as http:
            assert (await http.get("/livez")).status_code == 200
        assert await first_to_end(opened) == 0
        hang_up(opened)


async def test_http_streams_in_progress_keep_their_connections(cluster: ScriptedCluster) -> None:
    cluster.hold_after = 1
    async with serving(cluster, max_connections=16) as server:
        async with httpx.AsyncClient(
            base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
        ) as http:
            answer = asyncio.create_task(
                http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
            )
            await cluster.held.wait()
            assert server.http_address is not None
            opened = await connect(server.http_address, 40)
            cluster.say_on.set()
            assert (await answer).json()["usage"]["completion_tokens"] == 2
        hang_up(opened)


async def test_silent_tls_connections_make_room(cluster: ScriptedCluster, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    tls = TlsSection(certificate=str(pair.certificate), key=str(pair.key))
    async with serving(cluster, {"tls": tls}, max_connections=16) as server:
        assert server.http_address is not None
        opened = await connect(server.http_address, 8)
        trusting = ssl.create_default_context(cafile=str(authority.certificate))
        async with httpx.AsyncClient(verify=trusting, trust_env=False, timeout=WAIT_S) as http:
            assert (await http.get(f"https://{server.http_address}/livez")).status_code == 200
        assert await first_to_end(opened) == 0
        hang_up(opened)


async def test_grpc_connections_without_calls_make_room(
    cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections with calls are kept, however many arrive."""
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
    answer: pb.GenerateResponse = await pdserve_pb2_grpc.GenerationStub(channel).Generate(
        request(), wait_for_ready=True
    )
    return answer


def test_workers_keep_descriptors_whatever_clients_open() -> None:
    assert connections_of_each(4096, 1 << 16) == 4096
    for num_descriptors in (1024, 2048, 4096):
        each = connections_of_each(4096, num_descriptors)
        assert each + each // 2 + each <= num_descriptors - RESERVED_DESCRIPTORS, (
            "gRPC's with its slack, and HTTP's"
        )


async def test_without_descriptors_accepting_pauses_and_logs_once(
    cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "OUT_OF_DESCRIPTORS_S", 0.01)
    monkeypatch.setattr(peer_log._LIMIT, "_budget", peer_log.LineBudget())
    async with serving(cluster) as server:
        assert server._http is not None
        listener = _Exhausted(server._http._listener, 1)
        monkeypatch.setattr(server._http, "_listener", listener)
        async with httpx.AsyncClient(
            base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
        ) as http:
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


async def test_health_watches_of_one_connection_leave_room_for_calls(
    cluster: ScriptedCluster, keys: dict[str, Any]
) -> None:
    async with (
        serving(cluster, keys, max_open_calls=8) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        watches = [health_pb2_grpc.HealthStub(channel).Watch(WATCH) for _ in range(500)]
        answers = await asyncio.gather(*(anext(aiter(watch)) for watch in watches), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert len(refused) == 500 - KeylessCalls.MAX_OF_ONE_CONNECTION
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        async with grpc.aio.insecure_channel(
            server.grpc_address, (("grpc.use_local_subchannel_pool", 1),)
        ) as another:
            assert (
                await health_pb2_grpc.HealthStub(another).Check(WATCH)
            ).status == health_pb2.HealthCheckResponse.NOT_SERVING
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
    """Calls whose message never arrives count as calls, too."""
    never = asyncio.Event()

    async def messages() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with (
        serving(cluster, keys, max_open_calls=8) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        silent = [
            channel.stream_unary("/pdserve.v1.Generation/Generate", None, None)(
                messages(), metadata=as_key(MALLORY)
            )
            for _ in range(50)
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
async def test_an_unwanted_body_is_not_read(server: GatewayServer, path: str) -> None:
    (reader, writer), *_ = await connect(server.http_address or "", 1)
    writer.write(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999\r\n\r\n{{".encode())
    answer = await asyncio.wait_for(
        reader.read(), WAIT_S
    )  # to the end of the connection; the body never arrives
    assert answer.split()[1] in (b"404", b"405")
    writer.close()


async def test_bodies_are_bounded_in_total_and_released(cluster: ScriptedCluster) -> None:
    async with serving(cluster, max_held_bytes=1 << 20) as server:
        assert server.http_address is not None
        opened = await connect(server.http_address, 2)
        for _, writer in opened:  # 90 KB each of the 128 KiB that one client may hold
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 95000\r\n\r\n"
                + b" " * 90_000
            )
        refused = await first_to_end(opened)
        hang_up([opened[1 - refused]])
        async with httpx.AsyncClient(
            base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
        ) as http:
            while (
                answer := await http.post("/v1/completions", json={"prompt": "a" * 90_000})
            ).status_code == 429:
                assert answer.json()["error"]["code"] == "too_many_bytes"
            assert answer.status_code == 400  # read, and refused for its length
        hang_up(opened)


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_bounded_while_they_are_put_together(
    cluster: ScriptedCluster, stream: bool, details: Callable[[grpc.aio.AioRpcError], dict[str, Any]]
) -> None:
    cluster.token_ids *= 20
    body = {"prompt": [5] * 200, "echo": True, "logprobs": 20, "max_tokens": 20, "n": 4, "stream": stream}
    async with (
        serving(cluster, max_held_bytes=1 << 20) as server,
        httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S) as http,
    ):
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 400  # no retry could help
        assert answer.json()["error"]["code"] == "too_large"
        assert "limits.max_held_bytes" in answer.json()["error"]["message"]
        answer = await http.post("/v1/completions", json=body | {"logprobs": 0})
        assert answer.status_code == 200
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = pdserve_pb2_grpc.GenerationStub(channel)
            asked = request()
            asked.sampling.logprobs, asked.sampling.n, asked.sampling.max_tokens = 20, 4, 200
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Generate(asked)
            assert details(refused.value)["ErrorInfo"].reason == "TOO_LARGE"
            assert "RetryInfo" not in details(refused.value)


def test_clients_that_hold_all_they_may_leave_calls_for_the_next_one() -> None:
    calls = OpenCalls(1024)
    with ExitStack() as held:
        for client, part in (("mallory", 512), ("mike", 170), ("max", 86)):
            for _ in range(part):
                held.enter_context(calls.enter(client))
            with pytest.raises(NoPlace, match=f"{part} calls of one client"):
                held.enter_context(calls.enter(client))
        with calls.enter("alice"):
            assert len(calls) == 512 + 170 + 86 + 1
    assert not len(calls)


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


async def test_a_message_that_arrives_at_once_needs_no_place() -> None:
    reads, came = PendingReads(4), asyncio.Event()
    came.set()
    assert {await _receive(reads, "alice", came) for _ in range(100)} == {"came"}


async def test_a_message_that_never_arrives_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_bounds, "MESSAGE_TIMEOUT_S", 0.01)
    assert (
        await _receive(PendingReads(4), "alice", asyncio.Event()) == "the message did not come within 0.01 s"
    )


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
def test_a_peers_host_is_found_in_either_servers_notation(peer: str, host: str) -> None:
    assert call_bounds.host_of(peer) == host


async def test_reflection_accepts_only_small_messages(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    large = reflection_pb2.ServerReflectionRequest(file_by_filename="x" * 70_000)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(aiter(stub.ServerReflectionInfo(iter([large]))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    small = reflection_pb2.ServerReflectionRequest(list_services="")
    assert (await anext(aiter(stub.ServerReflectionInfo(iter([small]))))).list_services_response.service
