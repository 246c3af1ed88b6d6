"""The time by which an endpoint's deadlines run. Pure: the hub ticks it in production and in the
simulator."""

from collections.abc import Callable


class OwnTime:
    """A clock that passes at most `max_step_s` from one tick to the next: while this side stands still - its
    host is suspended, or its loop is kept from running - it reads nothing, and blames no peer for that."""

    def __init__(self, clock: Callable[[], float], max_step_s: float) -> None:
        self._clock = clock
        self._max_step_s = max_step_s
        self._ticked_s = self._own_s = clock()

    def __call__(self) -> float:
        return self._own_s + min(self._clock() - self._ticked_s, self._max_step_s)

    def tick(self) -> None:
        """This side moves; called at each of its beats."""
        self._own_s = self()
        self._ticked_s = self._clock()
