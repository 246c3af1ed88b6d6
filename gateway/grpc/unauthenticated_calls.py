"""Bounds how many calls without a key one gRPC connection may make before it is closed. Pure.

A refusal costs the server more than the call cost its client. A connection that makes only such calls, and
very many of them, is closed and has to be reopened, which costs the client as much."""

from collections import Counter

WINDOW_S = 10.0
MAX_IN_WINDOW = 2000


class UnpaidCalls:
    """Counts calls by connection in consecutive windows of time."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._ends_s = 0.0

    def add(self, connection: str, now_s: float) -> bool:
        """Counts one call; returns whether the connection has made too many of them in this window."""
        if now_s >= self._ends_s:
            self._counts.clear()
            self._ends_s = now_s + WINDOW_S
        self._counts[connection] += 1
        return self._counts[connection] > MAX_IN_WINDOW
