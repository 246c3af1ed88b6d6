"""Log lines of a cluster's processes, shown by the process that launched it: packets on a socket that only
its user reaches.

A process that logs never waits: lines that the other end does not accept are dropped, and the next line
states their number."""

import contextlib
import logging
import selectors
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

MAX_LINE_BYTES = 160 << 10
CLOSE_S = 2.0


class TextSink(Protocol):
    """Takes whole lines."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> None: ...


class LogRelay:
    """The displaying end: writes each line to `stream`, and calls `keep` with it, on a thread of its own."""

    def __init__(self, stream: TextSink, keep: Callable[[str], None] = lambda line: None) -> None:
        self._stream = stream
        self._keep = keep
        self._directory = Path(tempfile.mkdtemp(prefix="pdserve-log-", dir="/tmp"))  # for this user alone
        self.path = str(self._directory / "lines")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self._ending, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._show, name="log-relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Shows the lines that have arrived so far, and no more."""
        self._end.close()
        self._thread.join(CLOSE_S)  # a terminal that is held writes nothing
        shutil.rmtree(self._directory, ignore_errors=True)

    def _show(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as sockets:
            for watched in (self._listener, self._ending):
                selector.register(sockets.enter_context(watched), selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                for source in ready:
                    assert isinstance(source, socket.socket)
                    if source is self._listener:
                        selector.register(sockets.enter_context(source.accept()[0]), selectors.EVENT_READ)
                    elif source is not self._ending and not self._show_line(source):
                        selector.unregister(source)
                        source.close()
                if ready == [self._ending]:
                    return

    def _show_line(self, source: socket.socket) -> bool:
        """False when nothing comes from there any more."""
        try:
            line = source.recv(MAX_LINE_BYTES)
        except OSError:
            return False
        if line:
            text = line.decode(errors="replace")
            self._keep(text)
            self._stream.write(text + "\n")
            self._stream.flush()
        return bool(line)


class RelayHandler(logging.Handler):
    """The logging end. Raises OSError when nothing listens at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.num_dropped = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # a record that cannot be formatted must not end the operation it describes
            self.handleError(record)
            return
        if self.num_dropped:
            notice = logging.LogRecord(
                __name__, logging.WARNING, __file__, 0, "%d lines were dropped", (self.num_dropped,), None
            )
            if self._send(self.format(notice)):
                self.num_dropped = 0
        if not self._send(line):
            self.num_dropped += 1

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _send(self, line: str) -> bool:
        try:
            self._socket.send(line.encode(errors="backslashreplace")[:MAX_LINE_BYTES])
        except OSError:  # full, or gone
            return False
        return True
