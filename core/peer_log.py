"""The loggers for lines that peers can cause: one rate limit for all those before a peer has authenticated,
one for those on calls that fail by a bug.

Any peer that can connect could otherwise fill a disk. Suppressed lines are counted, and the next line that
passes states their number."""

import logging
import threading
import time

BURST_LINES = 20
LINES_PER_S = 1.0
THIRD_PARTY_LOGGERS = (
    "asyncio",
    "grpc",
    "grpc._cython.cygrpc",
    "uvicorn.error",
)  # they log what connections do, too


class LineBudget:
    """Decides which lines pass: `num_at_once`, then `lines_per_s`. Pure: the caller brings the time."""

    def __init__(self, num_at_once: float = BURST_LINES, lines_per_s: float = LINES_PER_S) -> None:
        self._num_at_once, self._lines_per_s = num_at_once, lines_per_s
        self._level = float(num_at_once)
        self._filled_s: float | None = None
        self._num_suppressed = 0

    def take(self, now_s: float) -> int | None:
        """Returns the number of lines suppressed since the last one that passed; None when this one is
        suppressed too."""
        if self._filled_s is not None:
            self._level = min(
                self._num_at_once, self._level + max(0.0, now_s - self._filled_s) * self._lines_per_s
            )
        self._filled_s = now_s
        if self._level < 1.0:
            self._num_suppressed += 1
            return None
        self._level -= 1.0
        num_suppressed, self._num_suppressed = self._num_suppressed, 0
        return num_suppressed


class RateLimit(logging.Filter):
    """Applies one budget to all loggers that it is added to. Thread-safe."""

    def __init__(self, budget: LineBudget) -> None:
        super().__init__()
        self._budget = budget
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            num_suppressed = self._budget.take(time.monotonic())
        if num_suppressed:
            record.msg, record.args = (
                f"{record.getMessage()} ({num_suppressed} lines like this were suppressed)",
                (),
            )
        return num_suppressed is not None


_LIMIT = RateLimit(LineBudget())
peer_log = logging.getLogger("pdserve.peers")
peer_log.addFilter(_LIMIT)
failure_log = logging.getLogger("pdserve.failures")
failure_log.addFilter(RateLimit(LineBudget()))


def limit_third_party_lines() -> None:
    """Puts the libraries that accept connections under the same limit; idempotent."""
    for name in THIRD_PARTY_LOGGERS:
        logging.getLogger(name).addFilter(_LIMIT)
