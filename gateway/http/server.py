"""Listens for HTTP on the head's loop, by uvicorn's protocol without its process management."""

import asyncio
import socket
from email.utils import formatdate
from typing import Any

from uvicorn import Config
from uvicorn.server import ServerState

from ...core.config_types import parse_host_port
from ...core.errors import ConfigError
from ..tls import ServerTls
from .connection import KEEP_ALIVE_S, MAX_HEADER_BYTES, Connection

BACKLOG = 2048
HANDSHAKE_TIMEOUT_S = 10.0


class HttpServer:
    """From `open` to `stop`."""

    def __init__(self, app: Any, address: str, max_connections: int) -> None:
        """Raises ConfigError when the address is taken."""
        self._listener = _listen(address)
        self.address = f"{address.rpartition(':')[0]}:{self._listener.getsockname()[1]}"
        protocol = type("LimitedConnection", (Connection,), {"max_connections": max_connections})
        self._config = Config(
            app,
            http=protocol,
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
        self._protocol = protocol
        self._state = ServerState()
        self._clock: asyncio.TimerHandle | None = None
        self._server: asyncio.Server

    @staticmethod
    async def open(app: Any, address: str, max_connections: int, tls: ServerTls | None = None) -> "HttpServer":
        """Listen on `address`. Raises ConfigError when it is taken."""
        server = HttpServer(app, address, max_connections)
        server._tell_time()
        handshake: dict[str, Any] = (
            {} if tls is None else {"ssl": tls.ssl_context(), "ssl_handshake_timeout": HANDSHAKE_TIMEOUT_S}
        )
        loop = asyncio.get_running_loop()
        server._server = await loop.create_server(server._connection, sock=server._listener, backlog=BACKLOG, **handshake)
        return server

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, give running requests `grace_s` to end, then end them; idempotent."""
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=grace_s)
        for task in self._state.tasks:
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._clock is not None:
            self._clock.cancel()

    def _connection(self) -> Connection:
        connection: Connection = self._protocol(config=self._config, server_state=self._state, app_state={})
        return connection

    def _tell_time(self) -> None:
        """The Date header of the next second's answers."""
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._clock = asyncio.get_running_loop().call_later(1.0, self._tell_time)


def _listen(address: str) -> socket.socket:
    host_port = parse_host_port(address)
    assert host_port is not None, address
    host, port = host_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is told: else a chunk waits for the client's delayed ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"listen.http: cannot listen on {address}: {error.strerror}") from error
    return listener
