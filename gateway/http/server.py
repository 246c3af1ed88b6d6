"""Listens for HTTP on the head's loop, with uvicorn's protocol but without its process management.

Connections are accepted here and not by asyncio: each needs a place before any work is done for it, and until
its first byte arrives it is only a socket, so that a flood of connections costs little. With TLS this holds
until its first record is complete and its handshake has its turn: one begins in each turn of the loop, of one
address after the other."""

import asyncio
import itertools
import socket
from contextlib import suppress
from email.utils import formatdate
from typing import Any

from uvicorn import Config
from uvicorn.server import ServerState

from ...core.config_types import parse_host_port
from ...core.errors import ConfigError
from ...core.peer_log import peer_log
from ..auth.tls import ServerTls
from ..connections import places_for
from ..places import FairPlaces, NoPlace, address_group
from ..turns import Turns
from . import connection
from .connection import KEEP_ALIVE_S, MAX_HEADER_BYTES, Connection
from .feeder import Feeder
from .tls import MAX_RECORD_BYTES, TlsProtocol, whole_records

BACKLOG = 2048
MAX_ACCEPTED_AT_ONCE = 64
OUT_OF_DESCRIPTORS_S = 0.5
TICK_S = 1.0


class HttpServer:
    """The HTTP server, which is running from `open` to `stop`."""

    def __init__(self, app: Any, address: str, max_connections: int, tls: ServerTls | None = None) -> None:
        """Raises ConfigError when the address is taken."""
        self._listener = _listen(address)
        self.address = f"{address.rpartition(':')[0]}:{self._listener.getsockname()[1]}"
        self._places: FairPlaces[int] = places_for(max_connections)
        self._numbers = itertools.count()  # of connections
        self._sockets: dict[int, socket.socket] = {}  # by connection number
        self._protocols: dict[int, Connection] = {}  # from their first byte on
        self._silent: dict[int, float] = {}  # connections that have not begun, and since when; oldest first
        self._hellos: dict[int, bytearray] = {}  # the first bytes of TLS connections
        self._feeder = Feeder()
        self._turns: Turns[int] = Turns()  # connections whose handshakes have yet to begin
        self._turn: asyncio.Handle | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._context = None if tls is None else tls.ssl_context()
        self._config = Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",  # else any client could fill the log
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._config.load()
        self._state = ServerState()
        self._clock: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None

    @staticmethod
    async def open(
        app: Any, address: str, max_connections: int, tls: ServerTls | None = None
    ) -> "HttpServer":
        """Listens on `address`. Raises ConfigError if it is in use."""
        server = HttpServer(app, address, max_connections, tls)
        server._tick()
        server._listener.setblocking(False)
        server._listener.listen(BACKLOG)
        server._resume()
        return server

    async def stop(self, grace_s: float) -> None:
        """Accepts no new connections, gives running requests `grace_s` to end, then ends them; idempotent."""
        self._stop_accepting()
        self._listener.close()
        self._end_silent_ones(float("inf"))
        for handshake in self._handshakes:
            handshake.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        for opened in list(self._state.connections):
            opened.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=grace_s)
        for task in self._state.tasks:
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)
        for opened in list(self._state.connections):
            opened.transport.abort()
        if self._clock is not None:
            self._clock.cancel()

    def _resume(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _stop_accepting(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        elif self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        """Accepts a bounded number of pending connections, so that streams get their turn."""
        for _ in range(MAX_ACCEPTED_AT_ONCE):
            try:
                sock, (host, *_) = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except (
                OSError
            ) as error:  # out of descriptors or memory: pending connections are served once some are free
                peer_log.warning("listen.http: cannot accept connections: %s", error.strerror)
                self._stop_accepting()
                self._pause = asyncio.get_running_loop().call_later(OUT_OF_DESCRIPTORS_S, self._resume)
                return
            self._welcome(sock, address_group(host), next(self._numbers))

    def _welcome(self, sock: socket.socket, group: str, number: int) -> None:
        """Assigns a place to a connection, and serves it."""
        try:
            evicted = self._places.take(group, number)
        except NoPlace as error:
            peer_log.warning("listen.http: %s", error)
            sock.close()
            return
        if evicted is not None:
            peer_log.warning("listen.http: the oldest connection lost its place to a newcomer")
            self._end(evicted)
        loop = asyncio.get_running_loop()
        self._sockets[number], self._silent[number] = sock, loop.time()
        sock.setblocking(False)
        if self._context is None:
            loop.add_reader(sock, self._on_first_byte, number)
        else:
            loop.add_reader(sock, self._on_hello_bytes, number, group)

    def _on_hello_bytes(self, number: int, group: str) -> None:
        try:
            received = self._sockets[number].recv(MAX_RECORD_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            received = b""
        if not received:
            self._end(number)
            return
        hello = self._hellos.setdefault(number, bytearray())
        hello += received
        if whole_records(hello)[0]:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sockets[number])
            self._turns.add(group, number)
            self._turn = self._turn or loop.call_soon(self._next_handshake)

    def _next_handshake(self) -> None:
        """Begins the next handshake; a signature takes as long as many tokens do."""
        self._turn = None
        while self._turns:
            number = self._turns.next()
            if number not in self._silent:
                continue  # it has lost its place
            if _has_left(self._sockets[number]):
                self._end(number)
                continue
            self._on_first_byte(number)
            break
        if self._turns:
            self._turn = asyncio.get_running_loop().call_soon(self._next_handshake)

    def _on_first_byte(self, number: int) -> None:
        loop, sock = asyncio.get_running_loop(), self._sockets[number]
        loop.remove_reader(sock)
        del self._silent[number]
        handshake = loop.create_task(self._begin(sock, number))
        self._handshakes.add(handshake)
        handshake.add_done_callback(lambda done: self._begun(done, sock, number))

    def _end(self, number: int) -> None:
        """Ends a connection that has lost its place, or exceeded its time."""
        sock = self._sockets[number]
        if self._silent.pop(number, None) is not None:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
            self._forget(number)
        elif (opened := self._protocols.get(number)) is not None and opened.transport is not None:
            opened.transport.abort()
        else:
            with suppress(OSError):  # its TLS sees its peer disconnect
                sock.shutdown(socket.SHUT_RDWR)

    def _end_silent_ones(self, until_s: float) -> None:
        """Ends the connections that have been silent since then."""
        while self._silent and (oldest := next(iter(self._silent.items())))[1] <= until_s:
            self._end(oldest[0])

    async def _begin(self, sock: socket.socket, number: int) -> None:
        group = address_group(sock.getpeername()[0])  # OSError: it has left
        loop, connection = asyncio.get_running_loop(), self._connection(number, group)
        if self._context is None:
            await loop.connect_accepted_socket(lambda: connection, sock)
            return
        handshake = loop.create_future()
        tls = TlsProtocol(connection, self._context, handshake, self._feeder, self._hellos.pop(number))
        transport, _ = await loop.connect_accepted_socket(lambda: tls, sock)
        try:
            await handshake
        except BaseException:
            transport.abort()
            raise

    def _begun(self, handshake: asyncio.Task[None], sock: socket.socket, number: int) -> None:
        self._handshakes.discard(handshake)
        if (
            handshake.cancelled() or handshake.exception() is not None
        ):  # its TLS failed or was late, it disconnected, or we are stopping
            sock.close()
            self._forget(number)

    def _connection(self, number: int, group: str) -> Connection:
        state = {"in_use": lambda: self._places.in_use(number)}
        made = Connection(
            self._config, self._state, state, self._feeder, group, on_lost=lambda: self._forget(number)
        )
        self._protocols[number] = made
        return made

    def _forget(self, number: int) -> None:
        self._places.leave(number)
        self._sockets.pop(number, None)
        self._hellos.pop(number, None)
        self._protocols.pop(number, None)

    def _tick(self) -> None:
        """Runs every second: updates the Date header of responses, and ends silent connections."""
        loop = asyncio.get_running_loop()
        self._clock = loop.call_later(TICK_S, self._tick)
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._end_silent_ones(loop.time() - connection.HEADER_TIMEOUT_S)


def _listen(address: str) -> socket.socket:
    host_port = parse_host_port(address)
    assert host_port is not None, address
    host, port = host_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only where the protocol is given: else a chunk waits for the client's
    # delayed ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"listen.http: cannot listen on {address}: {error.strerror}") from error
    return listener


def _has_left(sock: socket.socket) -> bool:
    """Whether the peer of a connection that has sent its hello has hung up."""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True
