"""The cluster's status for all who watch it: computed once for each interval, however many they are."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

INTERVAL_S = 0.2  # between two updates, at least
MAX_INTERVAL_S = 1.0  # without any change that is reported here


class StatusFeed(Generic[T]):
    """Publishes what `compute` returns, while somebody watches. Watchers that are slow skip updates."""

    def __init__(
        self,
        compute: Callable[[], T],
        interval_s: float = INTERVAL_S,
        max_interval_s: float = MAX_INTERVAL_S,
    ) -> None:
        self._compute = compute
        self._interval_s = interval_s
        self._max_interval_s = max_interval_s
        self._latest: T | None = None
        self._computed_s = float("-inf")
        self._changed = asyncio.Event()
        self._next: asyncio.Task[T] | None = None  # the update that all watchers wait for
        self._is_closed = False

    def change(self) -> None:
        """Has the status computed again."""
        self._changed.set()

    def close(self) -> None:
        """Ends all watches."""
        self._is_closed = True
        self._changed.set()

    async def watch(self) -> AsyncGenerator[T, None]:
        """Yields the status now, and again whenever it may have changed."""
        seen = self._latest
        if seen is None or asyncio.get_running_loop().time() >= self._computed_s + self._interval_s:
            seen = self._update()
        yield seen
        while not self._is_closed:
            if self._latest is seen or self._latest is None:
                if self._next is None or self._next.done():
                    self._next = asyncio.create_task(self._follow())
                seen = await asyncio.shield(self._next)
            else:  # it was slow
                seen = self._latest
            yield seen

    async def _follow(self) -> T:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), self._max_interval_s)
        due_s = self._computed_s + self._interval_s
        await asyncio.sleep(max(0.0, due_s - asyncio.get_running_loop().time()))
        return self._update()

    def _update(self) -> T:
        self._changed.clear()
        self._latest, self._computed_s = self._compute(), asyncio.get_running_loop().time()
        return self._latest
