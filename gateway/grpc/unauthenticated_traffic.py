"""Bounds what a gRPC connection may send without a key before it is closed: calls, and bytes that belong to
no call. Pure.

A refusal costs the server more than the call cost its client. A connection that makes only such calls, and
very many of them, is closed and has to be reopened, which costs the client as much.

The library itself refuses calls beyond its bounds on streams and on pending calls, and it parses the data
that disconnected clients leave in its sockets. None of this appears as a call; all of it shows in the bytes
that the kernel has received. An honest client sends no more than one flow-control window, 64 KiB a call,
before its calls are seen, and then pauses: a connection has sent too much if it exceeds this in two
consecutive scans and the library has had more to parse in between. So calls with large messages may wait to
be seen for as long as it takes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WINDOW_S = 10.0
MAX_CALLS = 2000  # of a connection in a window
MAX_BYTES = 96 << 10


@dataclass(frozen=True)
class Received:
    """One connection as the kernel reports it."""

    num_bytes: int  # since the connection was opened
    num_unread: int  # received, and not yet parsed by the library
    has_left: bool  # its client sends no more


@dataclass(frozen=True)
class Verdict:
    """The connections to close, and whether to scan again soon."""

    too_much: set[str]
    left: set[str]
    is_suspicious: bool


class UnauthenticatedTraffic:
    """Counts calls without a key, and bytes, by connection in consecutive windows of time. The bytes of a
    connection that has a call with a key, or had one in this window or the last, are not bounded here."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()  # without a key, in this window
        self._last: dict[str, int] = {}  # bytes of each connection at the last scan
        self._before: dict[str, int] = {}  # and at the last scan of the last window
        self._suspects: set[str] = set()  # of the last scan
        self._authenticated: set[str] = set()
        self._authenticated_before: set[str] = set()
        self._ends_s = 0.0

    def add_call(self, connection: str, now_s: float) -> bool:
        """Counts a call without a key; returns whether the connection has made too many in this window."""
        self._begin_window(now_s)
        self._calls[connection] += 1
        return self._calls[connection] > MAX_CALLS

    def note_authenticated(self, connection: str) -> None:
        """Records that a call with a key begins or ends on it."""
        self._authenticated.add(connection)

    def judge(
        self, received: Mapping[str, Received], is_in_use: Callable[[str], bool], now_s: float
    ) -> Verdict:
        """Returns the connections that have sent too much, and those whose clients have disconnected: parsing
        their unread bytes would be wasted."""
        self._begin_window(now_s)
        at_last_scan = self._last
        self._last = {name: connection.num_bytes for name, connection in received.items()}
        self._before = {
            name: count for name, count in self._before.items() if count <= self._last.get(name, -1)
        }
        exempt = self._authenticated | self._authenticated_before
        bounded = {name for name in received if name not in exempt and not is_in_use(name)}
        over = {name for name in bounded if self._last[name] - self._before.get(name, 0) > MAX_BYTES}
        left = {name for name in bounded if received[name].has_left}
        resting = {
            name
            for name in over
            if not received[name].num_unread and self._last[name] == at_last_scan.get(name)
        }
        too_much = over & (self._suspects - resting | left)
        self._suspects = over - too_much
        return Verdict(too_much, left, is_suspicious=bool(over or left))

    def _begin_window(self, now_s: float) -> None:
        """Begins the next window if the last one is over."""
        if now_s >= self._ends_s:
            self._calls.clear()
            self._before = self._last
            self._authenticated, self._authenticated_before = set(), self._authenticated
            self._ends_s = now_s + WINDOW_S
