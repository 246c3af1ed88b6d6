"""The sockets of a gRPC server, which its library keeps to itself: found among the process's own descriptors,
inspected, and closed underneath the library.

No call here releases the GIL. While the loop is busy each release costs 5 ms to get it back, and thousands of
sockets would take seconds, just when a flood is under way."""

import ctypes
import re
import socket
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..places import connection_name
from .unauthenticated_traffic import Received

STATUS = Path("/proc/self/status")
_NUM_DESCRIPTORS = re.compile(r"^FDSize:\s*(\d+)", re.MULTILINE)
SO_COOKIE = 57  # asm-generic/socket.h: a number unique among this host's sockets
_COOKIE_BYTES = 8
_ESTABLISHED, _CLOSED, _CLOSE_WAIT = 1, 7, 8  # linux/tcp.h
_TCP_INFO = struct.Struct("B127xQ")  # the same: tcpi_state and tcpi_bytes_received
_UNSPECIFIED = struct.pack("H14x", socket.AF_UNSPEC)  # a struct sockaddr
_libc = ctypes.PyDLL(None)


@dataclass(frozen=True)
class GrpcSocket:
    """A connection's socket at the time of the scan; its descriptor may have been reused since."""

    descriptor: int
    cookie: bytes
    received: Received | None  # None: it receives no more

    def abort(self) -> None:
        """Aborts the connection and discards what was received but not read: after shutdown(2), or when the
        client disconnects, the library would still parse it to the last byte. The library sees a connection
        reset by its peer."""
        copy = _libc.dup(self.descriptor)
        if copy < 0:  # closed in the meantime
            return
        try:
            if _cookie(copy) == self.cookie:
                # connect(2): dissolves the association
                _libc.connect(copy, _UNSPECIFIED, len(_UNSPECIFIED))
        finally:
            _libc.close(copy)


class GrpcSockets:
    """The connections of the server that listens on `port`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.num_reset = 0  # connections that the last scan aborted
        self._names: dict[bytes, str | None] = {}  # by socket cookie; None: not the server's

    def look(self) -> dict[str, GrpcSocket]:
        """Returns all open connections by name. Aborts those that were reset by their clients, and omits
        them."""
        match = _NUM_DESCRIPTORS.search(STATUS.read_text())
        assert match is not None, "proc(5) has it since Linux 2.6"
        self.num_reset = 0
        found, names = dict[str, GrpcSocket](), dict[bytes, str | None]()
        for descriptor in range(int(match[1])):
            cookie = _cookie(descriptor)
            if cookie is None:
                continue
            if self._names.get(cookie, "") is None:  # known as none of the server's
                names[cookie] = None
                continue
            with suppress(OSError), _borrowed(descriptor) as sock:  # OSError: closed in the meantime
                name = names[cookie] = self._names.get(cookie) or self._name_of(sock)
                if name is None:
                    continue
                state, num_bytes = _TCP_INFO.unpack(
                    sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
                )
                received = None
                if state in (_ESTABLISHED, _CLOSE_WAIT):
                    received = Received(num_bytes, _num_unread(descriptor), has_left=state == _CLOSE_WAIT)
                connection = GrpcSocket(descriptor, cookie, received)
                if state == _CLOSED:
                    connection.abort()
                    self.num_reset += 1
                else:
                    found[name] = connection
        self._names = names
        return found

    def _name_of(self, sock: socket.socket) -> str | None:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) not in (socket.AF_INET, socket.AF_INET6):
            return None
        if sock.getsockname()[1] != self._port or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        try:
            host, peer_port = sock.getpeername()[:2]
        except OSError:  # reset by its client
            return "reset"
        return connection_name(host, peer_port)


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Wraps a descriptor owned elsewhere as a socket, without checking its kind. Raises OSError if it is not
    open."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, descriptor)
    try:
        yield sock
    finally:
        sock.detach()


def _num_unread(descriptor: int) -> int:
    """Raises OSError if it is not open."""
    count = ctypes.c_int()
    if _libc.ioctl(descriptor, ctypes.c_ulong(termios.FIONREAD), ctypes.byref(count)):
        raise OSError(f"ioctl(FIONREAD) of descriptor {descriptor} failed")
    return count.value


def _cookie(descriptor: int) -> bytes | None:
    """Returns a socket's cookie; None if the descriptor is no socket, or not open. Most are not, and an
    exception for each would be most of a scan's cost."""
    cookie, size = ctypes.create_string_buffer(_COOKIE_BYTES), ctypes.c_uint32(_COOKIE_BYTES)
    failed = _libc.getsockopt(descriptor, socket.SOL_SOCKET, SO_COOKIE, cookie, ctypes.byref(size))
    return None if failed else cookie.raw
