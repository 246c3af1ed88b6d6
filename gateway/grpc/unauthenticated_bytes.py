"""Bounds how many bytes a gRPC connection may send outside calls with a key before it is closed. Pure.

The library itself refuses calls beyond its bounds on streams and on pending calls, and it parses the data
that disconnected clients leave in its sockets. None of this appears as a call; all of it shows in the bytes
that the kernel has received. An honest client sends no more than one flow-control window, 64 KiB a call,
before its calls are seen, and then pauses: a connection has sent too much if it exceeds this in two
consecutive scans and the library has had more to parse in between. So calls with large messages may wait to
be seen for as long as it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

WINDOW_S = 10.0
MAX_IN_WINDOW = 96 << 10


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


class UnpaidBytes:
    """Counts bytes by connection in consecutive windows of time. A connection that has a call with a key, or
    had one in this window or the last, is paid for."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # bytes of each connection at the last scan
        self._before: dict[str, int] = {}  # and at the last scan of the last window
        self._suspects: set[str] = set()  # of the last scan
        self._paid: set[str] = set()
        self._paid_before: set[str] = set()
        self._ends_s = 0.0

    def add_paid(self, connection: str) -> None:
        """Records that a call with a key begins or ends on it."""
        self._paid.add(connection)

    def judge(
        self, received: Mapping[str, Received], is_in_use: Callable[[str], bool], now_s: float
    ) -> Verdict:
        """Returns the connections that have sent too much, and those whose clients have disconnected: parsing
        their unread bytes would be wasted."""
        if now_s >= self._ends_s:
            self._before = self._last
            self._paid, self._paid_before = set(), self._paid
            self._ends_s = now_s + WINDOW_S
        at_last_look = self._last
        self._last = {name: connection.num_bytes for name, connection in received.items()}
        self._before = {
            name: count for name, count in self._before.items() if count <= self._last.get(name, -1)
        }
        paid = self._paid | self._paid_before
        unpaid = {name for name in received if name not in paid and not is_in_use(name)}
        over = {name for name in unpaid if self._last[name] - self._before.get(name, 0) > MAX_IN_WINDOW}
        left = {name for name in unpaid if received[name].has_left}
        resting = {
            name
            for name in over
            if not received[name].num_unread and self._last[name] == at_last_look.get(name)
        }
        too_much = over & (self._suspects - resting | left)
        self._suspects = over - too_much
        return Verdict(too_much, left, is_suspicious=bool(over or left))
