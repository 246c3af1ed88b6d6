"""One pair's control stream: frames over a connected TCP or Unix socket, read and written on the endpoint's
loop."""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..core.codec import FrameDecoder, FrameEncoder, FrameError
from .config import MAX_FRAME_BYTES

_READ_BYTES = 16 << 10  # frames are small; a larger buffer would be mapped anew for every read
T = TypeVar("T")


class Channel(Generic[T]):
    """Passes messages of type `kind` to `on_message`; calls `on_lost` once when the peer or the stream
    fails."""

    def __init__(
        self,
        sock: socket.socket,
        kind: Any,
        on_message: Callable[[T], None],
        on_lost: Callable[[str], None],
        takes_fd: bool = False,
    ) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.on_message = on_message
        self.on_lost = on_lost
        self.fds: list[int] = []  # file descriptors that were received and not taken yet
        self._takes_fd = takes_fd and sock.family == socket.AF_UNIX
        self._sock = sock
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[T] = FrameDecoder(kind, MAX_FRAME_BYTES)
        self._unsent = bytearray()
        self._is_open = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._on_readable)

    @property
    def is_open(self) -> bool:
        return self._is_open

    def send(self, message: object, fd: int | None = None) -> None:
        """Sends now, or as soon as the peer reads again; a closed channel drops the message. `fd` may
        accompany only the first frame of a stream."""
        if not self._is_open:
            return
        frame = self._encoder.encode(message)
        if self._unsent:
            self._unsent += frame
            return
        try:
            sent = self._sock.send(frame) if fd is None else socket.send_fds(self._sock, [frame], [fd])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._loop.call_soon(self._read_and_lose, f"the connection failed: {error}")
            return
        if sent < len(frame):
            self._unsent += frame[sent:]
            self._loop.add_writer(self._sock, self._on_writable)

    def close(self) -> None:
        """Closes without calling `on_lost`; idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def _lose(self, error: str) -> None:
        if self._is_open:
            self.close()
            self.on_lost(error)

    def _read_and_lose(self, error: str) -> None:
        """Reads the peer's last messages, which may state why it closed."""
        if self._is_open:
            self._on_readable()
        self._lose(error)

    def _on_readable(self) -> None:
        try:
            data = self._read()
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(f"the connection failed: {error}")
            return
        if not data:
            self._lose("the peer closed the connection")
            return
        try:
            for message in self._decoder.feed(data):
                self.on_message(message)
                if not self._is_open:
                    return
        except FrameError as error:
            self._lose(f"the peer does not speak this protocol: {error}")

    def _read(self) -> bytes:
        if not self._takes_fd:
            return self._sock.recv(_READ_BYTES)
        data, fds, _, _ = socket.recv_fds(self._sock, _READ_BYTES, 1)
        self.fds += fds
        self._takes_fd = not fds
        return data

    def _on_writable(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(f"the connection failed: {error}")
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._sock)
