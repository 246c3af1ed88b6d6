"""Stderr with a last line that moves while something takes its time, on a terminal; elsewhere each step is a
line of its own.

Nothing has to be restored when the process ends at once: the cursor stays as it is."""

import sys
import threading
import time
from collections.abc import Callable
from itertools import cycle
from types import TracebackType

FRAME_S = 0.1
CLEAR = "\r\x1b[K"


class Screen:
    """Lines, and below them what is being done and for how long, between `begin` and `end`. Any thread may
    write."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` reports what is begun where there is no terminal."""
        self._say = say
        self._is_terminal = sys.stderr.isatty()
        self._lock = threading.Lock()  # guards the terminal's last line
        self._doing = ""
        self._began_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, doing: str) -> None:
        """Shows what is being done from now on."""
        self._doing, self._began_s = doing, time.monotonic()
        if not self._is_terminal:
            self._say(doing)
        elif self._thread is None:
            self._thread = threading.Thread(target=self._move, name="screen", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Clears the moving line, if there is one."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._put(CLEAR)

    def abandon(self) -> None:
        """Stops the moving line, and leaves it to be cleared: for the handler of a signal, which waits for no
        thread that the signal may have found with the lock."""
        self._ended.set()
        if self._lock.acquire(timeout=FRAME_S):
            self._lock.release()

    def write(self, text: str) -> None:
        """Writes whole lines above the moving one."""
        with self._lock:
            self._put(text if self._thread is None else CLEAR + text)

    def flush(self) -> None:
        """Nothing is held back."""

    def _move(self) -> None:
        for frame in cycle("|/-\\"):
            with self._lock:
                if not self._ended.is_set():
                    self._put(f"{CLEAR}{frame} {self._doing} ({time.monotonic() - self._began_s:.0f} s)")
            if self._ended.wait(FRAME_S):
                return

    def _put(self, text: str) -> None:
        sys.stderr.write(text)  # rich may have put something else there, which keeps its bars below
        sys.stderr.flush()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
