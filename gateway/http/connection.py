"""One client's connection: uvicorn's, with limits on those that send or read too slowly."""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEADER_TIMEOUT_S = 10.0  # for the head of a request, from the connection's start or its first byte
KEEP_ALIVE_S = 75  # longer than the pools of common clients keep theirs
MAX_HEADER_BYTES = 32 << 10


class Connection(H11Protocol):
    """Calls `on_lost` once, at its end."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], on_lost: Callable[[], None]
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._head_timer: asyncio.TimerHandle | None = None
        self._on_lost = on_lost

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state: dict[str, Any] = self.app_state | {"abort": transport.abort}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # the head of a request is not complete
            self._await_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._on_lost()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for long; what is unread of the last answer by now will not be read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
