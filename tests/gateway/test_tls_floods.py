"""Attacks on HTTPS by unauthenticated peers: handshakes that stall, and records that cost more than they
carry."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from pdserve.core.config_listen import TlsSection
from pdserve.gateway.http import tls as http_tls
from pdserve.gateway.http.connection import Connection
from pdserve.gateway.http.server import HttpServer
from pdserve.gateway.http.tls import (
    MAX_EMPTY_RECORDS,
    MAX_HANDSHAKE_BYTES,
    MAX_RECORD_BYTES,
    SLICE_RECORDS,
    whole_records,
)
from tests.certificates import Authority
from tests.deadlines import WAIT_S
from tests.gateway.flooding import connect, first_to_end, hang_up, serving, until, until_closed
from tests.gateway.support import ScriptedCluster

RECORD = b"\x17\x03\x03\x00\x02ab"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.certificate))


@pytest.fixture
async def https(cluster: ScriptedCluster, authority: Authority) -> AsyncIterator[HttpServer]:
    async with serving_https(cluster, authority) as server:
        yield server


@asynccontextmanager
async def serving_https(
    cluster: ScriptedCluster, authority: Authority, **limits: int
) -> AsyncIterator[HttpServer]:
    pair = authority.sign("server")
    tls = TlsSection(certificate=str(pair.certificate), key=str(pair.key))
    async with serving(cluster, {"tls": tls}, **limits) as server:
        assert server._http is not None
        yield server._http


async def is_live(server: HttpServer, trusting: ssl.SSLContext) -> bool:
    async with httpx.AsyncClient(verify=trusting, trust_env=False, timeout=WAIT_S) as http:
        return (await http.get(f"https://{server.address}/livez")).status_code == 200


class Client:
    """A TLS client whose records are made one by one."""

    def __init__(self, trusting: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = trusting.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def hello(self) -> bytes:
        with pytest.raises(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    async def open(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ((reader, writer),) = await connect(address, 1)
        writer.write(self.hello())
        while self._tls.version() is None or self._outgoing.pending:
            if not self._outgoing.pending:
                self._incoming.write(await reader.read(1 << 16))
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                continue
            writer.write(self._outgoing.read())
        return reader, writer

    def records(self, data: bytes, size: int) -> bytes:
        for start in range(0, len(data), size):
            self._tls.write(data[start : start + size])
        return self._outgoing.read()

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        while True:
            try:
                return self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                self._incoming.write(await asyncio.wait_for(reader.read(1 << 16), WAIT_S))


# handshakes


async def test_half_a_client_hello_costs_only_its_bytes(https: HttpServer, trusting: ssl.SSLContext) -> None:
    hello = Client(trusting).hello()
    opened = await connect(https.address, 30)
    for _, writer in opened:
        writer.write(hello[: len(hello) // 2])
    assert await is_live(https, trusting)
    assert len(https._sockets) >= 30 and len(https._protocols) <= 1
    for _, writer in opened:
        writer.write_eof()
    await asyncio.gather(*(until_closed(reader) for reader, _ in opened))
    assert len(https._protocols) <= 1
    hang_up(opened)


async def test_hellos_of_one_address_do_not_delay_anothers(
    https: HttpServer, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = https._on_first_byte
    monkeypatch.setattr(https, "_on_first_byte", lambda number: (begun.append(number), begin(number)))
    hellos = [Client(trusting).hello() for _ in range(20)]
    opened = await connect(https.address, len(hellos))
    await until(lambda: len(https._sockets) == len(hellos))
    *flood, other = https._sockets
    for number, hello in zip(https._sockets, hellos, strict=True):  # as if all had come in one turn
        https._hellos[number] = bytearray(hello)
        https._turns.add("other" if number == other else "flood", number)
    https._next_handshake()
    await until(lambda: len(begun) == len(hellos))
    assert begun.index(other) <= 1 and [number for number in begun if number != other] == flood
    hang_up(opened)


async def test_no_handshake_begins_for_a_peer_that_has_left(
    https: HttpServer, trusting: ssl.SSLContext
) -> None:
    opened = await connect(https.address, 20)
    await until(lambda: len(https._sockets) == 20)
    numbers = list(https._sockets)
    hang_up(opened)
    for number in numbers:
        asyncio.get_running_loop().remove_reader(https._sockets[number])
        https._hellos[number] = bytearray(Client(trusting).hello())
        https._turns.add("flood", number)
    https._next_handshake()
    await until(lambda: not https._sockets)
    assert not https._handshakes and not https._protocols


async def test_a_hello_in_pieces_is_answered(https: HttpServer, trusting: ssl.SSLContext) -> None:
    ((reader, writer),) = await connect(https.address, 1)
    for byte in Client(trusting).hello():
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(reader.readexactly(1), WAIT_S)) == b"\x16"
    writer.transport.abort()


async def test_http_without_tls_is_refused_at_once(https: HttpServer) -> None:
    ((reader, writer),) = await connect(https.address, 1)
    writer.write(b"GET /livez HTTP/1.1\r\n")
    assert (await asyncio.wait_for(reader.read(), WAIT_S))[:1] in (b"", b"\x15")  # an alert
    writer.close()


async def test_handshakes_that_stop_make_room(
    cluster: ScriptedCluster, authority: Authority, trusting: ssl.SSLContext
) -> None:
    async with serving_https(cluster, authority, max_connections=16) as server:
        opened = await connect(server.address, 8)  # the bound of one address
        for reader, writer in opened:
            writer.write(Client(trusting).hello())
            await reader.readexactly(1)  # of its answer
        assert await is_live(server, trusting)
        assert await first_to_end(opened) == 0
        hang_up(opened)


async def test_a_handshake_is_bounded_in_bytes(https: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ClientHello of 128 KiB, as OpenSSL would accept it."""
    monkeypatch.setattr(http_tls, "HANDSHAKE_TIMEOUT_S", 1000)
    ((reader, writer),) = await connect(https.address, 1)
    piece = b"\x16\x03\x01\x40\x00" + b"\x01\x01\xff\xff\x03\x03" + b"a" * ((1 << 14) - 6)
    writer.write(piece * (MAX_HANDSHAKE_BYTES // len(piece) + 1))
    await asyncio.wait_for(until_closed(reader), WAIT_S)
    await until(lambda: not https._sockets and not len(https._places))
    writer.close()


# records


async def test_one_byte_records_are_a_body_like_any_other(
    https: HttpServer, trusting: ssl.SSLContext
) -> None:
    """Consecutive requests, so that reading pauses and resumes."""
    client = Client(trusting)
    reader, writer = await client.open(https.address)
    body = b'{"prompt": "hello", "max_tokens": 1}' + b" " * 3000
    for _ in range(3):
        writer.write(client.records(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body, 1))
    answers = b""
    while answers.count(b"HTTP/1.1 200 ") < 3:
        answers += await client.read(reader)
    writer.transport.abort()


async def test_floods_of_tiny_records_do_not_delay_others(
    https: HttpServer, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are answered while most of the flood is unread."""
    num_received = 0
    take: Any = Connection.data_received

    def count(connection: Connection, data: bytes) -> None:
        nonlocal num_received
        num_received += len(data)
        take(connection, data)

    monkeypatch.setattr(Connection, "data_received", count)
    clients = [Client(trusting) for _ in range(20)]
    opened = [await client.open(https.address) for client in clients]
    flood = HEAD + b"content-length: 90000\r\n\r\n" + b" " * 10_000
    floods = [client.records(flood, 1) for client in clients]
    for (_, writer), records in zip(opened, floods, strict=True):
        writer.write(records)
    for _ in range(3):
        assert await is_live(https, trusting)
    assert num_received < len(flood) * len(opened) // 2
    hang_up(opened)


async def test_records_without_data_end_their_connection(https: HttpServer, authority: Authority) -> None:
    """Sends key updates: OpenSSL's client makes one for each line `k` in its input."""
    arguments = (
        "-connect",
        https.address,
        "-tls1_3",
        "-CAfile",
        str(authority.certificate),
        "-servername",
        "localhost",
    )
    client = await asyncio.create_subprocess_exec(
        "openssl",
        "s_client",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert client.stdin is not None and client.stderr is not None
    num_updates = 0
    try:
        while num_updates < 4 * MAX_EMPTY_RECORDS:
            client.stdin.write(b"k\n")
            while (
                line := await asyncio.wait_for(client.stderr.readline(), WAIT_S)
            ) and line != b"KEYUPDATE\n":
                pass
            if not line:
                break
            num_updates += 1
        assert MAX_EMPTY_RECORDS <= num_updates < 4 * MAX_EMPTY_RECORDS
    finally:
        if client.returncode is None:
            client.kill()
        await client.wait()


@pytest.mark.parametrize(
    ("received", "whole"),
    [
        (b"", (0, 0)),
        (RECORD[:4], (0, 0)),
        (RECORD[:-1], (0, 0)),
        (RECORD + RECORD[:-1], (len(RECORD), 1)),
        (RECORD * 1000, (len(RECORD) * SLICE_RECORDS, SLICE_RECORDS)),
        (b"GET / HTTP/1.1", (14, 1)),
        (b"\x16\x03\x01\xff\xff" + b"a" * 20_000, (MAX_RECORD_BYTES, 1)),
    ],
    ids=[
        "nothing",
        "half a header",
        "half a record",
        "one and a half",
        "many",
        "no record",
        "too long a record",
    ],
)
def test_only_complete_records_are_processed(received: bytes, whole: tuple[int, int]) -> None:
    assert whole_records(bytearray(received)) == whole
