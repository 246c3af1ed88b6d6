"""Items that each wait for a time of their own, soonest first."""

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Timetable(Generic[T]):
    """A change costs the logarithm of the number of items: entries that are out of date stay in the heap
    until they come up, or outnumber the others."""

    def __init__(self) -> None:
        self._entries: dict[T, tuple[float, int]] = {}  # its time, and the number of its entry in the heap
        self._heap: list[tuple[float, int, T]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def put(self, item: T, at_s: float | None) -> None:
        """Adds an item, or changes its time; None removes it."""
        if at_s is None:
            self.discard(item)
            return
        entry = self._entries.get(item)
        if entry is not None and entry[0] == at_s:
            return
        self._entries[item] = at_s, next(self._numbers)
        heappush(self._heap, (*self._entries[item], item))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(*entry, item) for item, entry in self._entries.items()]
            heapify(self._heap)

    def discard(self, item: T) -> bool:
        """Removes an item; returns False when it is absent."""
        return self._entries.pop(item, None) is not None

    def pop_due(self, now_s: float) -> list[T]:
        """Takes out the items whose time has come, soonest first, those of the same time in order of
        `put`."""
        due = []
        while (at_s := self.next_s()) is not None and at_s <= now_s:
            item = heappop(self._heap)[2]
            del self._entries[item]
            due.append(item)
        return due

    def next_s(self) -> float | None:
        """Returns the soonest time; None without items."""
        while self._heap:
            at_s, number, item = self._heap[0]
            if self._entries.get(item) == (at_s, number):
                return at_s
            heappop(self._heap)
        return None
