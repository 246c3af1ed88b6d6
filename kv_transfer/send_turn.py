"""Decides which link sends, where links of one process must not send concurrently."""

from collections import deque
from collections.abc import Callable

Call = Callable[[], None]


class SendTurn:
    """Pure. Links take turns in the order in which they asked; the one whose turn it is may send again while
    none waits."""

    def __init__(self) -> None:
        self._holder: object | None = None
        self._num_under_way = 0
        # the last: chunks that the call brings under way
        self._waiting: deque[tuple[object, Call, int]] = deque()

    def take(self, link: object, call: Call) -> None:
        """Calls now, or when it is this link's turn; the link then has one more chunk under way, until
        `give_back`."""
        self._waiting.append((link, call, 1))
        self._go_on()

    def behind(self, link: object, call: Call) -> None:
        """Calls now, or after all that this link has asked for and not begun."""
        if any(waiting[0] is link for waiting in self._waiting):
            self._waiting.append((link, call, 0))
        else:
            call()

    def give_back(self, link: object) -> None:
        """One of the link's chunks has left."""
        if link is self._holder:
            self._num_under_way -= 1
            self._go_on()

    def drop(self, link: object) -> None:
        """The link is gone, and all that it had under way."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not link)
        if link is self._holder:
            self._num_under_way = 0
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and (self._num_under_way == 0 or self._waiting[0][0] is self._holder):
            self._holder, call, num_chunks = self._waiting.popleft()
            self._num_under_way += num_chunks
            call()
