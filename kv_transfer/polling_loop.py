"""An asyncio loop that waits for its sockets and for a device at once."""

import asyncio
import math
import select
import time
from selectors import EpollSelector, SelectorKey

from .store_work import StoreWaits

POLL_S = 20e-6  # far below the duration of a chunk
MAX_POLL_S = 500e-6
# of a wait: work behind a prefill's steps is polled less often, and keeps the CPU less busy
_LATENESS = 0.125
_MAX_SELECT_FD = 1023  # `select` is alone in waiting for less than a millisecond, and takes no higher ones


class PollingSelector(EpollSelector):
    """A selector that also returns when works of a store have ended, which the loop's next turn reports."""

    def __init__(self, waits: StoreWaits) -> None:
        super().__init__()
        self._waits = waits
        self._since_s = time.monotonic()  # since when nothing was waited for, or the last work ended
        self.loop: asyncio.AbstractEventLoop | None = None

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        now_s = time.monotonic()
        if self._waits.is_idle:
            self._since_s = now_s
            return super().select(timeout)
        due_s = math.inf if timeout is None else now_s + timeout
        while not self._has_ended() and (now_s := time.monotonic()) < due_s:
            pause_s = min(max((now_s - self._since_s) * _LATENESS, POLL_S), MAX_POLL_S)
            if self._is_readable(min(pause_s, due_s - now_s)):
                break
        return super().select(0)

    def _has_ended(self) -> bool:
        ended = self._waits.take_ended()
        for report in ended:
            assert self.loop is not None, "it is the selector's"
            self.loop.call_soon(report)
            self._since_s = time.monotonic()
        return bool(ended)

    def _is_readable(self, pause_s: float) -> bool:
        """Whether a socket is ready, within the pause."""
        if self.fileno() > _MAX_SELECT_FD:
            time.sleep(pause_s)
            return bool(super().select(0))  # level-triggered: it is so again when it is asked once more
        return bool(select.select((self.fileno(),), (), (), pause_s)[0])


def polling_loop(waits: StoreWaits) -> asyncio.AbstractEventLoop:
    """Returns a new loop, for `asyncio.Runner`."""
    selector = PollingSelector(waits)
    selector.loop = asyncio.SelectorEventLoop(selector)
    return selector.loop
