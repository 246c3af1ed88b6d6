"""HTTP is parsed a little in each turn of the loop, however much expensive input clients send."""

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from pdserve.gateway.app import GatewayServer
from pdserve.gateway.http.connection import (
    MAX_HEADER_BYTES,
    MAX_HEADER_LINES,
    REQUEST_COST,
    SLICE_BYTES,
    Connection,
)
from pdserve.gateway.http.feeder import TURN_BYTES, Feeder
from pdserve.gateway.http.server import HttpServer
from tests.deadlines import WAIT_S


class Bytes:
    """A connection whose bytes are all expensive."""

    def __init__(
        self,
        name: str,
        count: int,
        fed: list[tuple[str, int]],
        is_urgent: bool = False,
        group: str = "address",
    ) -> None:
        self._name, self._left, self._fed = name, count, fed
        self.is_urgent = is_urgent
        self.group = group

    def feed(self) -> int:
        piece = min(SLICE_BYTES, self._left)
        self._left -= piece
        self._fed.append((self._name, piece))
        return piece

    @property
    def wants_feeding(self) -> bool:
        return self._left > 0


async def turns_of(feeder: Feeder, fed: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Returns the feeding of each turn, until there is none."""
    turns = [list(fed)]
    while True:
        before = len(fed)
        await asyncio.sleep(0)
        if len(fed) == before:
            return turns
        turns.append(fed[before:])


async def test_no_turn_parses_more_than_its_share_for_any_connection_count() -> None:
    fed: list[tuple[str, int]] = []
    feeder = Feeder()
    for index in range(40):
        feeder.run(Bytes(str(index), 45_000, fed))
    turns = await turns_of(feeder, fed)
    assert max(sum(count for _, count in turn) for turn in turns) < TURN_BYTES + SLICE_BYTES
    totals = Counter[str]()
    for name, count in fed:
        totals[name] += count
    assert set(totals.values()) == {45_000}


async def test_heads_precede_chunks_that_wait_longer() -> None:
    fed: list[tuple[str, int]] = []
    feeder = Feeder()
    for index in range(200):
        feeder.run(Bytes(str(index), 1_000_000, fed))
    feeder.run(Bytes("newcomer", 300, fed, is_urgent=True))
    before = len(fed)
    await asyncio.sleep(0)
    assert fed[before][0] == "newcomer"


async def test_addresses_take_turns_however_many_connections_one_of_them_has() -> None:
    fed: list[tuple[str, int]] = []
    feeder = Feeder()
    for index in range(1000):
        feeder.run(Bytes(f"mallory{index}", 300, fed, is_urgent=True, group="mallory"))
    for index in range(3):
        feeder.run(Bytes(f"alice{index}", 300, fed, is_urgent=True, group="alice"))
    before = len(fed)
    await asyncio.sleep(0)
    assert [name for name, _ in fed[before : before + 6] if name.startswith("alice")] == [
        "alice0",
        "alice1",
        "alice2",
    ]


async def test_small_requests_are_parsed_at_once() -> None:
    fed: list[tuple[str, int]] = []
    Feeder().run(Bytes("alone", 300, fed))
    assert fed == [("alone", 300)]


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


async def connection(server: GatewayServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = (server.http_address or "").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_tiny_chunks_are_a_body_like_any_other(server: GatewayServer) -> None:
    body = b'{"prompt": "hello", "max_tokens": 1}' + b" " * 3000
    reader, writer = await connection(server)
    writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
    writer.write(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize("length", [b"", b"content-length: 1\r\n"])
async def test_floods_of_tiny_chunks_do_not_delay_others(
    server: GatewayServer, monkeypatch: pytest.MonkeyPatch, length: bytes
) -> None:
    """Others are answered while nine tenths of the flood are unparsed, also where a length makes it look
    cheap."""
    num_parsed, feed = 0, Connection.feed

    def counted(connection: Connection) -> int:
        nonlocal num_parsed
        before = len(connection._pending)
        cost = feed(connection)
        num_parsed += before - len(connection._pending)
        return cost

    monkeypatch.setattr(Connection, "feed", counted)
    flood = HEAD + length + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 30_000
    opened = [await connection(server) for _ in range(20)]
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        # connects before the flood, as it looks the address up on a thread, and the flood is parsed meanwhile
        assert (await http.get("/livez")).status_code == 200
        for _, writer in opened:
            writer.write(flood)
        for _ in range(3):
            assert (await http.get("/livez")).status_code == 200
    assert num_parsed < len(opened) * len(flood) / 10
    for _, writer in opened:
        writer.transport.abort()


CHUNKS = b"2\r\n{}\r\n0\r\n\r\n"
NEXT = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"content-length: 4\r\ntransfer-encoding: chunked\r\n", CHUNKS),
        (b"transfer-encoding: chunked\r\ncontent-length: 4\r\n", CHUNKS),
        (b"content-length: 2\r\ncontent-length: 3\r\n", b"{}"),
        (b"content-length : 2\r\n", b"{}"),
        (b"content-length: +2\r\n", b"{}"),
        (b"transfer-encoding : chunked\r\n", CHUNKS),
        (b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", CHUNKS),
        (b"transfer-encoding: gzip, chunked\r\n", CHUNKS),
        (b"transfer-encoding: chunked\r\n", b"2;\n{}\r\n0\r\n\r\n"),
        (b"transfer-encoding: chunked\r\n", b"0x2\r\n{}\r\n0\r\n\r\n"),
        (b"x: a\rcontent-length: 3\r\ncontent-length: 2\r\n", b"{}"),
        (b"host: another\r\ncontent-length: 2\r\n", b"{}"),
    ],
)
async def test_a_request_with_an_ambiguous_end_closes_its_connection(
    server: GatewayServer, head: bytes, body: bytes
) -> None:
    """A proxy that parses it differently has taken the data after it for another client's request."""
    reader, writer = await connection(server)
    writer.write(HEAD + head + b"\r\n" + body + NEXT)
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    writer.close()


@pytest.mark.parametrize(
    "head",
    [b"x: " + b"a" * (MAX_HEADER_BYTES + 4096), b"a:\r\n" * (MAX_HEADER_LINES + SLICE_BYTES)],
    ids=["bytes", "lines"],
)
async def test_a_head_received_at_once_is_bounded_too(server: GatewayServer, head: bytes) -> None:
    reader, writer = await connection(server)
    writer.write(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 400 ")
    writer.close()


async def test_requests_that_wait_behind_another_are_answered_in_order(server: GatewayServer) -> None:
    reader, writer = await connection(server)
    body = b'{"prompt": "hello", "max_tokens": 1}'
    for number in range(20):
        writer.write(HEAD + b"x-request-id: %d\r\ncontent-length: %d\r\n\r\n" % (number, len(body)) + body)
    for number in range(20):
        answer = await asyncio.wait_for(reader.readuntil(b"x-request-id: "), WAIT_S)
        assert answer.count(b"HTTP/1.1 200") <= 1
        assert await reader.readline() == b"%d\r\n" % number
    writer.close()


async def test_few_requests_begin_in_a_turn_however_many_bodies_wait() -> None:
    loop, turn, begun = asyncio.get_running_loop(), 0, Counter[int]()

    def count_turns() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count_turns)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        begun[turn] += 1
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    server = await HttpServer.open(app, "127.0.0.1:0", max_connections=1024)
    host, _, port = server.address.rpartition(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(300)]
    count_turns()
    for _, writer in opened:
        writer.write(HEAD + b"content-length: 2\r\n\r\n{}")
    for reader, _ in opened:
        assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 204 ")
    assert sum(begun.values()) == 300
    assert max(begun.values()) <= TURN_BYTES // REQUEST_COST + 1
    for _, writer in opened:
        writer.close()
    await server.stop(0)
