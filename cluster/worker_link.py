"""A worker's end of its control connection to the router: frames up from any thread, commands down on a reader thread."""

import contextlib
import socket
import threading
from collections.abc import Callable

from ..core.codec import FrameDecoder, FrameEncoder, FrameError
from ..core.messages import Hello, StepReport, WorkerCommand

HEARTBEAT_S = 0.5


class RouterLink:
    """Sends block while the router does not read, so a worker never runs ahead of it without bound."""

    def __init__(
        self,
        address: tuple[str, int],
        hello: Hello,
        on_command: Callable[[WorkerCommand], None],
        on_lost: Callable[["RouterLink"], None],
    ) -> None:
        """Raises OSError when no router answers. `on_lost` is called on the reader thread, once."""
        self._socket = socket.create_connection(address, timeout=10.0)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._on_command = on_command
        self._on_lost = on_lost
        self._encoder = FrameEncoder()
        self._write_lock = threading.Lock()  # of the encoder and the socket
        self._closed = threading.Event()
        self._heartbeat: Callable[[], StepReport] | None = None
        self._threads = [
            threading.Thread(target=self._read, name="router-reader", daemon=True),
            threading.Thread(target=self._beat, name="heartbeat", daemon=True),
        ]
        self.send(hello)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def start_heartbeat(self, report: Callable[[], StepReport]) -> None:
        """Send `report()` every 0.5 s from now on."""
        self._heartbeat = report

    def send(self, *messages: object) -> None:
        """All messages in one write; dropped when the connection is gone, which `on_lost` tells."""
        try:
            with self._write_lock:
                self._socket.sendall(b"".join(map(self._encoder.encode, messages)))
        except OSError:
            self._closed.set()

    def close(self) -> None:
        """Hang up; idempotent."""
        self._closed.set()
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
        self._socket.close()

    def _read(self) -> None:
        decoder: FrameDecoder[WorkerCommand] = FrameDecoder(WorkerCommand)
        try:
            while data := self._socket.recv(1 << 18):
                for command in decoder.feed(data):
                    self._on_command(command)
        except (OSError, FrameError):
            pass  # either way the router is lost to us
        self._closed.set()
        self._on_lost(self)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            if self._heartbeat is not None:
                self.send(self._heartbeat())
