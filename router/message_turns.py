"""Workers' messages, handled for a little while in each turn of the head's loop: between two turns clients'
calls are accepted and their tokens sent, however much the workers have to say."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

# of a turn; between the two, as much as all else in the loop took since the last one
MIN_S, MAX_S = 0.002, 0.05


class MessageTurns:
    """Used on one asyncio loop. Connections take turns, a message each."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._waiting: deque[Iterator[object]] = deque()
        self._left_s = MIN_S  # of this turn
        self._stopped_s = 0.0  # when it last handled one
        self._has_begun = False

    def run(self, messages: Iterator[object]) -> None:
        """Exhausts `messages`, which are handled as they are yielded: now, if none wait and there is time
        left in this turn, else in later ones."""
        self._waiting.append(messages)
        if len(self._waiting) == 1:
            self._go_on()

    def _go_on(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            asyncio.get_running_loop().call_soon(self._next_turn)
        started_s = now_s = self._clock()
        while self._waiting and now_s - started_s < self._left_s:
            messages = self._waiting.popleft()
            if next(messages, self) is not self:
                self._waiting.append(messages)
            now_s = self._clock()
        self._left_s -= now_s - started_s
        self._stopped_s = now_s

    def _next_turn(self) -> None:
        self._left_s = min(max(MIN_S, self._clock() - self._stopped_s), MAX_S)
        self._has_begun = False
        if self._waiting:
            self._go_on()
