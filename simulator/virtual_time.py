"""A clock that jumps from event to event, and processes that can be killed or frozen on it."""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random

Callback = Callable[[], object]


class Timer:
    """One pending call."""

    __slots__ = ("call",)

    def __init__(self, call: Callback) -> None:
        self.call: Callback | None = call

    def cancel(self) -> None:
        self.call = None


class VirtualTime:
    """Runs callbacks in order of time; those of one instant in an order drawn from `rng`."""

    def __init__(self, rng: Random) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._rng = rng
        self._sequence = count()
        self._heap: list[tuple[float, float, int, Timer]] = []

    def call_at(self, at_s: float, call: Callback) -> Timer:
        timer = Timer(call)
        heappush(self._heap, (max(at_s, self.now_s), self._rng.random(), next(self._sequence), timer))
        return timer

    def call_later(self, delay_s: float, call: Callback) -> Timer:
        return self.call_at(self.now_s + delay_s, call)

    def step(self, until_s: float) -> bool:
        """Runs the next callback; returns False when there is none before `until_s`."""
        while self._heap and self._heap[0][3].call is None:
            heappop(self._heap)
        if not self._heap or self._heap[0][0] > until_s:
            return False
        at_s, _, _, timer = heappop(self._heap)
        self.now_s = at_s
        self.num_events += 1
        call, timer.call = timer.call, None
        assert call is not None
        call()
        return True


class VirtualProcess:
    """An operating system's process as others see it: it may die for good, or freeze for a while."""

    def __init__(self, time: VirtualTime, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.is_frozen = False
        self._time = time
        self._still_until_s = 0.0
        self._waiting: deque[Callback] = deque()  # callbacks that came due while it was frozen
        self._on_death: list[Callback] = []

    def call_at(self, at_s: float, call: Callback) -> Timer:
        """Runs `call` in this process: never if it is dead by then, later if it is frozen by then."""
        return self._time.call_at(at_s, lambda: self._run(call))

    def call_later(self, delay_s: float, call: Callback) -> Timer:
        return self.call_at(self._time.now_s + delay_s, call)

    def every(self, interval_s: float, call: Callback) -> None:
        """Runs `call` periodically while the process is alive."""

        def again() -> None:
            call()
            self.call_later(interval_s, again)

        self.call_later(interval_s, again)

    def when_it_dies(self, call: Callback) -> None:
        """Registers a kernel action on the process's death: closing connections, informing the parent."""
        self._on_death.append(call)

    def kill(self) -> None:
        if not self.is_alive:
            return
        self.is_alive = False
        self._waiting.clear()
        for call in self._on_death:
            call()

    def stand_still(self, seconds: float) -> None:
        """Freezes the process, or lets one turn of its loop take this long. All calls that come due meanwhile
        run afterwards, in order."""
        self.is_frozen = True
        self._still_until_s = max(self._still_until_s, self._time.now_s + seconds)
        self._time.call_at(self._still_until_s, self._resume)

    def _resume(self) -> None:
        if self._time.now_s < self._still_until_s:
            return
        self.is_frozen = False
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            self._run(call)

    def _run(self, call: Callback) -> None:
        if not self.is_alive:
            return
        if self.is_frozen:
            self._waiting.append(call)
        else:
            call()
