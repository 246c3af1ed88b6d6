"""The handshake on tests' own sockets, so that they can say what they like behind it."""

import asyncio
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pdserve.core.handshake import HandshakeAcceptor, HandshakeDialler, Purpose


def read(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = sock.recv(num_bytes - len(data))
        assert more, "the peer hung up"
        data += more
    return data


def shake_hands(sock: socket.socket, side: HandshakeDialler | HandshakeAcceptor) -> None:
    sock.sendall(side.opening)
    while side.num_wanted:
        sock.sendall(side.take(read(sock, side.num_wanted)))


@contextmanager
def greeted(listener: socket.socket, token: str) -> Iterator["queue.SimpleQueue[socket.socket]"]:
    """Performs a router's part of the handshake while a worker connects to `listener`; then the queue has the
    connection."""
    accepted: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def greet() -> None:
        sock, _ = listener.accept()
        shake_hands(sock, HandshakeAcceptor(token, Purpose.CONTROL))
        accepted.put(sock)

    thread = threading.Thread(target=greet)
    thread.start()
    yield accepted
    thread.join()


async def open_control(port: int, token: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a router, behind the handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    side = HandshakeDialler(token, Purpose.CONTROL)
    writer.write(side.opening)
    while side.num_wanted:
        writer.write(side.take(await reader.readexactly(side.num_wanted)))
    return reader, writer
