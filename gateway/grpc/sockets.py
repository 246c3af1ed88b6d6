"""The sockets of a gRPC server, which its library keeps to itself: found among the process's own descriptors,
looked at and ended under the library.

No call here lets go of the interpreter. While the loop is busy each that does waits 5 ms to get it back, and
thousands of sockets would take seconds, during a flood of all times."""

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
from .unpaid_bytes import Received

STATUS = Path("/proc/self/status")
_NUM_DESCRIPTORS = re.compile(r"^FDSize:\s*(\d+)", re.MULTILINE)
SO_COOKIE = 57  # asm-generic/socket.h: a number that no other socket of this host has or will have
_ESTABLISHED, _CLOSED, _CLOSE_WAIT = 1, 7, 8  # linux/tcp.h
_TCP_INFO = struct.Struct("B127xQ")  # the same: tcpi_state and tcpi_bytes_received
_UNSPECIFIED = struct.pack("H14x", socket.AF_UNSPEC)  # a struct sockaddr
_libc = ctypes.PyDLL(None)


@dataclass(frozen=True)
class GrpcSocket:
    """A connection's socket when it was looked at; by now its descriptor may be another's."""

    descriptor: int
    cookie: bytes
    received: Received | None  # None: it receives no more

    def abort(self) -> None:
        """End the connection. What has come and was not read is gone: after shutdown(2), or when the client
        hangs up, the library still parses it to the last byte. The library sees its peer reset the
        connection."""
        copy = _libc.dup(self.descriptor)
        if copy < 0:  # closed meanwhile
            return
        try:
            with suppress(OSError), _borrowed(copy) as sock:
                if _cookie(sock) == self.cookie:
                    _libc.connect(
                        copy, _UNSPECIFIED, len(_UNSPECIFIED)
                    )  # connect(2): dissolves the association
        finally:
            _libc.close(copy)


class GrpcSockets:
    """Those of the server that listens on `port`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.num_reset = 0  # connections that the last look aborted
        self._names: dict[bytes, str | None] = {}  # by their cookies; None: not a connection of the server's

    def look(self) -> dict[str, GrpcSocket]:
        """All connections there are by their names. Those that were reset by their clients are aborted, and
        are not among them."""
        match = _NUM_DESCRIPTORS.search(STATUS.read_text())
        assert match is not None, "proc(5) has it since Linux 2.6"
        self.num_reset = 0
        found, names = dict[str, GrpcSocket](), dict[bytes, str | None]()
        for descriptor in range(int(match[1])):
            with (
                suppress(OSError),
                _borrowed(descriptor) as sock,
            ):  # OSError: not open, no socket, or closed meanwhile
                cookie = _cookie(sock)
                name = names[cookie] = self._names[cookie] if cookie in self._names else self._name_of(sock)
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
        except OSError:  # its client has reset it
            return "reset"
        return connection_name(host, peer_port)


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A descriptor of somebody else's as a socket; its kind is not asked. Raises OSError where it is not
    open."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, descriptor)
    try:
        yield sock
    finally:
        sock.detach()


def _num_unread(descriptor: int) -> int:
    """Raises OSError where it is not open."""
    count = ctypes.c_int()
    if _libc.ioctl(descriptor, ctypes.c_ulong(termios.FIONREAD), ctypes.byref(count)):
        raise OSError(f"ioctl(FIONREAD) of descriptor {descriptor} failed")
    return count.value


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
