"""TLS of one HTTP connection: asyncio's, fed a few records at a time.

asyncio's own TLS reads 256 KiB at once and processes all of it, which may be ten thousand empty records. Here
ciphertext waits for the feeder as requests do, and the socket is not read meanwhile."""

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol

from ...core.peer_log import peer_log
from .connection import SHORT_HEAD_BYTES, Connection
from .feeder import Feeder

HEADER_BYTES = 5
MAX_RECORD_BYTES = HEADER_BYTES + (1 << 14) + 256  # RFC 8446, 5.2
RECORD_TYPES = range(20, 24)
SLICE_RECORDS = 64
RECORD_COST = 32  # this many bytes of HTTP take as long
MAX_EMPTY_RECORDS = 64  # in a row: key updates and the like
MAX_HANDSHAKE_BYTES = 32 << 10  # OpenSSL keeps up to 128 KiB of a hello, 100 KiB of certificates
HANDSHAKE_TIMEOUT_S = 10


def whole_records(received: bytearray) -> tuple[int, int]:
    """Returns how many bytes and records of `received` can be processed now. Invalid data counts as one
    record: OpenSSL refuses it."""
    size = num_records = 0
    while num_records < SLICE_RECORDS and len(received) >= size + HEADER_BYTES:
        end = size + HEADER_BYTES + int.from_bytes(received[size + 3 : size + HEADER_BYTES], "big")
        if received[size] not in RECORD_TYPES or end - size > MAX_RECORD_BYTES:
            end = min(len(received), size + MAX_RECORD_BYTES)
        if end > min(len(received), MAX_RECORD_BYTES):
            break
        size, num_records = end, num_records + 1
    return size, num_records


class TlsProtocol(SSLProtocol):
    """Sits between a socket and its connection. `handshake` completes with the handshake, and carries its
    error."""

    max_size = MAX_RECORD_BYTES

    def __init__(
        self,
        connection: Connection,
        context: ssl.SSLContext,
        handshake: asyncio.Future[None],
        feeder: Feeder,
        received: bytearray,
    ) -> None:
        """`received` holds the data of the handshake so far."""
        super().__init__(
            asyncio.get_running_loop(),
            connection,
            context,
            handshake,
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
        )
        self._connection = connection
        self._handshake = handshake
        self._feeder = feeder
        self._ciphertext = received
        self._handshake_bytes = 0
        self._num_empty = 0  # consecutive records without data for the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._socket = transport
        super().connection_made(transport)
        self._run()

    def buffer_updated(self, nbytes: int) -> None:
        self._ciphertext += self.get_buffer(nbytes)[:nbytes]
        self._run()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._ciphertext.clear()
        super().connection_lost(exc)

    @property
    def group(self) -> str:
        return self._connection.group

    @property
    def wants_feeding(self) -> bool:
        if not whole_records(self._ciphertext)[0]:
            return False
        return self._app_transport.is_reading() or self._app_transport.is_closing()

    @property
    def is_urgent(self) -> bool:
        return len(self._ciphertext) < SHORT_HEAD_BYTES

    def feed(self) -> int:
        """Processes one slice. In a handshake every byte is expensive, afterwards every record."""
        size, num_records = whole_records(self._ciphertext)
        is_handshake, num_received = not self._handshake.done(), self._connection.num_received_bytes
        self.get_buffer(size)[:size] = self._ciphertext[:size]
        del self._ciphertext[:size]
        super().buffer_updated(size)
        if is_handshake:
            self._handshake_bytes += size
        elif self._connection.num_received_bytes == num_received:
            self._num_empty += num_records
        else:
            self._num_empty = 0
        if self._num_empty > MAX_EMPTY_RECORDS:
            self._refuse(f"{self._num_empty} TLS records without data")
        elif self._handshake_bytes > MAX_HANDSHAKE_BYTES:
            self._refuse(f"a TLS handshake of {self._handshake_bytes} bytes")
        elif not whole_records(self._ciphertext)[0]:
            self._socket.resume_reading()
        return size if is_handshake else num_records * RECORD_COST

    def _refuse(self, reason: str) -> None:
        peer_log.warning("listen.http: a connection closed for %s", reason)
        self._ciphertext.clear()
        self._fatal_error(ConnectionAbortedError(reason))

    def _run(self) -> None:
        self._feeder.run(self)
        if whole_records(self._ciphertext)[0]:
            self._socket.pause_reading()

    def _resume_reading(self) -> None:
        super()._resume_reading()  # type: ignore[misc]  # the stubs lack it
        self._loop.call_soon(self._run)

    def _start_shutdown(self) -> None:
        super()._start_shutdown()
        self._loop.call_soon(self._run)  # to the peer's end of it
