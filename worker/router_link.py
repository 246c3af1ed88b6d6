"""A worker's end of its control connection to the router: frames up from any thread, commands down on a
reader thread."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

from ..core.codec import FrameDecoder, FrameEncoder, FrameError
from ..core.handshake import MAX_WAIT_S, HandshakeDialler, HandshakeError, Purpose
from ..core.messages import HEARTBEAT_S, Heartbeat, Hello, StepReport, WorkerCommand
from .router_session import RouterSilence


class RouterLink:
    """Sends block while the router does not read, so that a worker never runs ahead of it without bound."""

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        hello: Hello,
        on_command: Callable[[WorkerCommand], None],
        on_lost: Callable[["RouterLink"], None],
    ) -> None:
        """Raises OSError when no router of this cluster answers. `on_lost` is called once, on the reader
        thread."""
        self._socket = socket.create_connection(address, timeout=10.0)
        try:
            shake_hands(self._socket, HandshakeDialler(token, Purpose.CONTROL), "the router")
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(None)
        self._silence = RouterSilence(time.monotonic())
        # A router that stands still stops reading too: a sender that it blocks must find out as the heartbeat
        # would.
        seconds, fraction = divmod(self._silence.dead_after_s, 1.0)
        timeval = struct.pack("ll", int(seconds), int(fraction * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._on_command = on_command
        self._on_lost = on_lost
        self._encoder = FrameEncoder()
        self._write_lock = threading.Lock()  # guards the encoder and the socket
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
        """Sends `report()` every `HEARTBEAT_S` from now on."""
        self._heartbeat = report

    def send(self, *messages: object) -> None:
        """Sends all messages in one write; drops them when the connection is gone, which `on_lost`
        reports."""
        try:
            with self._write_lock:
                self._socket.sendall(b"".join(map(self._encoder.encode, messages)))
        except OSError:
            self._hang_up()

    def close(self) -> None:
        """Disconnects; idempotent."""
        self._hang_up()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
        self._socket.close()

    def _read(self) -> None:
        decoder: FrameDecoder[WorkerCommand] = FrameDecoder(WorkerCommand)
        try:
            while data := self._socket.recv(1 << 18):
                self._silence.heard(time.monotonic())
                for command in decoder.feed(data):
                    if not isinstance(command, Heartbeat):
                        self._on_command(command)
        except (OSError, FrameError):
            pass  # either way the router is lost to us
        self._closed.set()
        self._on_lost(self)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            if self._silence.is_lost(time.monotonic()):
                self._hang_up()
            elif self._heartbeat is not None:
                self.send(self._heartbeat())

    def _hang_up(self) -> None:
        """Ends the reader, which reports the loss; a frame may have left in part, so that nothing can follow
        it."""
        self._closed.set()
        with contextlib.suppress(OSError):  # the peer closed first
            self._socket.shutdown(socket.SHUT_RDWR)


def shake_hands(sock: socket.socket, dialler: HandshakeDialler, peer: str) -> None:
    """Authenticates this process to `peer`, and the peer to this process. Raises OSError."""
    due_s = time.monotonic() + MAX_WAIT_S
    message = dialler.opening
    while True:
        sock.sendall(message)
        if not dialler.num_wanted:
            return
        data = b""
        while len(data) < dialler.num_wanted:
            sock.settimeout(max(0.001, due_s - time.monotonic()))
            more = sock.recv(dialler.num_wanted - len(data))
            if not more:
                raise ConnectionError(f"{peer} hung up before it had proved that it belongs to this cluster")
            data += more
        try:
            message = dialler.take(data)
        except HandshakeError as error:
            raise ConnectionError(str(error)) from error
