"""Clients that disconnect, read or send too slowly, or send too much hold no resource for long."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from pdserve.core.errors import ConfigError
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.http import auth_middleware, connection, server as http_server
from pdserve.gateway.http.connection import MAX_HEADER_BYTES
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, byte_level, model_info

JSON = {"content-type": "application/json"}


class RawClient:
    """A client that writes raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @staticmethod
    async def connect(server: GatewayServer) -> "RawClient":
        host, _, port = (server.http_address or "").rpartition(":")
        return RawClient(*await asyncio.open_connection(host, int(port), limit=1024))

    def post(self, path: str, **body: object) -> None:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self.writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)

    async def until_closed(self) -> bytes:
        """Returns the rest of the received data."""
        parts = []
        try:
            while part := await self.reader.read(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)


@pytest.fixture
async def raw(server: GatewayServer) -> AsyncIterator[RawClient]:
    client = await RawClient.connect(server)
    yield client
    client.writer.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 3])
async def test_a_disconnecting_client_frees_its_resources(
    raw: RawClient, cluster: ScriptedCluster, stream: bool, num_prompts: int
) -> None:
    cluster.hold_after = 1
    raw.post("/v1/completions", prompt=["hello"] * num_prompts, max_tokens=9, stream=stream)
    while cluster.num_held < num_prompts:
        await cluster.held.wait()
        cluster.held.clear()
    assert cluster.closed == []
    raw.writer.close()
    while len(cluster.closed) < num_prompts:
        await cluster.all_closed.wait()
        cluster.all_closed.clear()
    assert sorted(cluster.closed) == sorted(request.request_id for request in cluster.requests)


async def test_a_refused_prompt_frees_the_others(http: httpx.AsyncClient, cluster: ScriptedCluster) -> None:
    headers = {"x-request-id": "a"}
    cluster.refused_ids = {"a-2"}
    cluster.hold_after = 0
    response = await http.post(
        "/v1/completions", json={"prompt": ["a", "b", "c"], "stream": True}, headers=headers
    )
    assert response.status_code == 429
    assert sorted(cluster.closed) == ["a-0", "a-1", "a-2"]


async def test_a_client_that_does_not_read_is_ended() -> None:
    cluster = ScriptedCluster(byte_level())
    limits = CONFIG.limits.model_copy(update={"max_unread_s": 0.05})
    config = CONFIG.model_copy(update={"limits": limits})
    server = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    client = await RawClient.connect(server)
    cluster.num_extra_logprobs = 50_000  # each message exceeds a connection's buffers
    messages = [{"role": "user", "content": "hello"}]
    client.post("/v1/chat/completions", messages=messages, max_tokens=200, logprobs=True, stream=True)
    await cluster.all_closed.wait()
    assert cluster.closed == [cluster.requests[0].request_id]
    assert cluster.num_said < 200
    await client.until_closed()
    client.writer.close()
    await server.stop(0)


async def test_an_oversized_body_is_refused_before_it_is_read(
    http: httpx.AsyncClient, cluster: ScriptedCluster
) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    for content in (b" " * 100_001, parts()):
        response = await http.post("/v1/completions", content=content, headers=JSON)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert cluster.requests == []


async def test_a_deep_body_is_refused(http: httpx.AsyncClient) -> None:
    for content in (b'{"prompt": ' + b"[" * 90_000, b'{"metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 301):
        response = await http.post("/v1/completions", content=content, headers=JSON)
        assert response.status_code == 400
        assert "recursion limit" in response.json()["error"]["message"]


async def test_an_invalid_body_gets_a_short_answer(http: httpx.AsyncClient) -> None:
    for body in (
        {"prompt": [True] * 9000},
        {"prompt": "a", "stop": [1] * 9000},
        {"prompt": "a", "stop_token_ids": ["x"] * 9000},
    ):
        response = await http.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert len(response.content) < 500


async def test_only_json_is_accepted(http: httpx.AsyncClient) -> None:
    """A web page may send a form or a text to a server on this machine without a preflight request, but not
    JSON."""
    response = await http.post(
        "/v1/completions", content='{"prompt": "hello"}', headers={"content-type": "text/plain"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


async def test_a_head_that_is_too_large_is_refused(raw: RawClient) -> None:
    raw.writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (2 * MAX_HEADER_BYTES))
    assert (await raw.until_closed()).startswith(b"HTTP/1.1 400 ")


async def test_other_protocols_than_http_are_refused(raw: RawClient) -> None:
    raw.writer.write(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    assert (await raw.until_closed()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost:"])
async def test_a_client_that_does_not_finish_its_head_is_ended(
    server: GatewayServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(http_server, "TICK_S", 0.01)
    client = await RawClient.connect(server)
    client.writer.write(sent)
    assert await client.until_closed() == b""
    client.writer.close()


async def test_a_client_that_does_not_finish_its_body_is_ended(
    raw: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth_middleware, "MESSAGE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(auth_middleware, "DISCARD_S", 0.05)
    raw.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{")
    assert (await raw.until_closed()).startswith(b"HTTP/1.1 408 ")


async def test_more_open_calls_than_allowed_are_refused_and_probes_are_not() -> None:
    cluster = ScriptedCluster(byte_level())
    limits = CONFIG.limits.model_copy(update={"max_open_calls": 1})
    config = CONFIG.model_copy(update={"limits": limits})
    server = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    cluster.hold_after = 0
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        first = asyncio.create_task(http.post("/v1/completions", json={"prompt": "hello"}))
        await cluster.held.wait()
        refused = await http.post("/v1/completions", json={"prompt": "hello"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_calls")
        assert refused.headers["retry-after"] == "1"
        assert (await http.get("/livez")).status_code == 200
        cluster.say_on.set()
        assert (await first).status_code == 200
        assert (await http.post("/v1/completions", json={"prompt": "hello"})).status_code == 200
    await server.stop(0)


async def test_a_chunk_does_not_wait_until_the_one_before_is_acknowledged(
    server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays_allowed: list[bool] = []
    made = connection.Connection.connection_made

    def watched(self: connection.Connection, transport: asyncio.Transport) -> None:
        accepted = transport.get_extra_info("socket")
        delays_allowed.append(not accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", watched)
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as client:
        await client.get("/v1/models")
    assert delays_allowed == [False]


async def test_stopping_gives_running_requests_their_time(
    server: GatewayServer, cluster: ScriptedCluster
) -> None:
    cluster.hold_after = 1
    raw = await RawClient.connect(server)
    raw.post("/v1/completions", prompt="hello", max_tokens=3)
    await cluster.held.wait()
    stopping = asyncio.create_task(server.stop(30.0))
    cluster.say_on.set()
    assert b"the quick brown" in await raw.until_closed()
    await stopping
    raw.writer.close()


async def test_stopping_at_once_ends_everything(server: GatewayServer, cluster: ScriptedCluster) -> None:
    cluster.hold_after = 1
    raw = await RawClient.connect(server)
    raw.post("/v1/completions", prompt="hello", max_tokens=3, stream=True)
    await cluster.held.wait()
    await server.stop(0)
    assert cluster.closed == [cluster.requests[0].request_id]
    assert b"[DONE]" not in await raw.until_closed()
    raw.writer.close()


async def test_a_port_in_use_is_named(server: GatewayServer) -> None:
    cluster = ScriptedCluster(byte_level())
    with pytest.raises(ConfigError, match=f"listen.http: cannot listen on {server.http_address}"):
        await serve(
            cluster,
            CONFIG,
            cluster.tokenizer,
            model_info(cluster.tokenizer),
            http_address=server.http_address,
        )


async def test_http_can_be_disabled() -> None:
    cluster = ScriptedCluster(byte_level())
    config = CONFIG.model_copy(update={"listen": CONFIG.listen.model_copy(update={"http": None})})
    server = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    assert server.http_address is None
    await server.stop(0)
