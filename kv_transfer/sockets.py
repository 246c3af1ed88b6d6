"""Sockets before they become pairs' channels: their addresses, and the handshake on them."""

import asyncio
import ipaddress
import socket

from ..core.handshake import HandshakeAcceptor, HandshakeDialler, HandshakeError


def address_family(host: str) -> socket.AddressFamily:
    """Returns the address family of an IP address in text form. Raises ValueError."""
    return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET


def listening_socket(host: str) -> socket.socket:
    """Opens a listening TCP socket on a free port of `host`. Raises OSError."""
    return socket.create_server((host, 0), family=address_family(host))


async def shake_hands(sock: socket.socket, side: HandshakeDialler | HandshakeAcceptor) -> None:
    """Returns when both sides have authenticated each other; reads no byte of what follows. Raises
    HandshakeError or OSError."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, side.opening)
    while side.num_wanted:
        await loop.sock_sendall(sock, side.take(await _read(loop, sock, side.num_wanted)))


async def _read(loop: asyncio.AbstractEventLoop, sock: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        more = await loop.sock_recv(sock, num_bytes - len(data))
        if not more:
            raise HandshakeError("the peer hung up before it had proved that it belongs to this cluster")
        data += more
    return bytes(data)
