"""One client's connection: uvicorn's, with limits on clients that send or read too slowly."""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .feeder import Feeder

HEADER_TIMEOUT_S = 10.0  # for the head of a request, from the connection's start or its first byte
KEEP_ALIVE_S = 75  # longer than the pools of common clients keep theirs
MAX_HEADER_BYTES = 32 << 10
MAX_HEADER_LINES = 128
HEAD_END = b"\r\n\r\n"
SHORT_HEAD_BYTES = 4096  # heads longer than common clients send are parsed after short ones
SLICE_BYTES = 2048
CHEAP_SLICE_BYTES, CHEAP_SHARE = 1 << 16, 64  # of a body whose length is known
REQUEST_COST = 256  # bytes of a head take as long as a request's beginning, which follows its last byte


class Connection(H11Protocol):
    """Calls `on_lost` once, when the connection ends.

    Received data waits in `_pending` until the feeder has a slice of it parsed, and the socket is not read
    meanwhile. Data after a request is not parsed until that request is answered, nor are chunks of a request
    whose answer is complete."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        feeder: Feeder,
        group: str,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._feeder = feeder
        self.group = group
        self._pending = bytearray()
        self.num_received_bytes = 0
        self._head_bytes = 0  # of an incomplete head
        self._head_lines = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._on_lost = on_lost

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state: dict[str, Any] = self.app_state | {
            "abort": transport.abort,
            "drained": self.flow.drain,  # waits until most of what was sent has left
        }
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self.num_received_bytes += len(data)
        self._pending += data
        self._feeder.run(self)
        if self._pending:
            self.transport.pause_reading()

    @property
    def wants_feeding(self) -> bool:
        return (
            bool(self._pending)
            and not self.transport.is_closing()
            and self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        )

    @property
    def is_urgent(self) -> bool:
        return self._head_bytes < SHORT_HEAD_BYTES if self.conn.their_state is h11.IDLE else self._has_length

    @property
    def _has_length(self) -> bool:
        """Whether the head of the request in progress states the length of its body; with chunked encoding
        that length is meaningless."""
        names = {name for name, _ in self.headers}
        return b"content-length" in names and b"transfer-encoding" not in names

    def feed(self) -> int:
        """Parses one slice. A body of stated length is cheap; heads and chunks are expensive."""
        is_body = self.conn.their_state is h11.SEND_BODY
        is_cheap = is_body and self._has_length
        if is_body and not is_cheap and self.conn.our_state not in (h11.SEND_RESPONSE, h11.SEND_BODY):
            self.transport.close()  # it is answered, and its chunks continue
            return 0
        size = CHEAP_SLICE_BYTES if is_cheap else SLICE_BYTES
        if not is_body and (end := self._pending.find(HEAD_END, 0, size)) >= 0:
            size = end + len(HEAD_END)  # a head by itself: the data after it may cost more
        piece = bytes(self._pending[:size])
        del self._pending[: len(piece)]
        super().data_received(piece)
        cost = len(piece) // CHEAP_SHARE if is_cheap else len(piece)
        if self.conn.their_state is h11.IDLE:
            self._check_head(piece)
        else:
            cost += self._head_bytes  # they were parsed just now
            self._head_bytes = self._head_lines = 0
            self._stop_waiting()
            if self.conn.their_state is not h11.SEND_BODY:
                cost += REQUEST_COST
        if not self._pending and not self.flow.read_paused:
            self.transport.resume_reading()
        return cost

    def _check_head(self, piece: bytes) -> None:
        """Counts `piece` of an incomplete head, and refuses the request if it is too large."""
        self._await_head()
        self._head_bytes += len(piece)
        self._head_lines += piece.count(b"\n")
        if self._head_bytes > MAX_HEADER_BYTES or self._head_lines > MAX_HEADER_LINES:
            self.send_400_response("The head of the request is too large.")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._feeder.run(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pending.clear()
        self._stop_waiting()
        self._on_lost()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Handles a long silence: any part of the last answer that is still unread will not be read."""
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
