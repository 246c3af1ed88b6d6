"""Items ordered by a key that changes often: reading the best few is free, a change costs two bisections."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ranking(Generic[T]):
    """Named items, smallest key first, ties by name."""

    def __init__(self) -> None:
        self._order: list[tuple[Any, str]] = []
        self._keys: dict[str, Any] = {}
        self._items: dict[str, T] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[T]:
        return (self._items[name] for _, name in self._order)

    def __reversed__(self) -> Iterator[T]:
        return (self._items[name] for _, name in reversed(self._order))

    def first_name(self) -> str | None:
        return self._order[0][1] if self._order else None

    def put(self, name: str, key: float | tuple[float, ...], item: T) -> None:
        """Adds an item, or moves it to the position of its new `key`."""
        old = self._keys.get(name)
        if old == key:
            self._items[name] = item
            return
        if old is not None:
            del self._order[bisect_left(self._order, (old, name))]
        insort(self._order, (key, name))
        self._keys[name] = key
        self._items[name] = item

    def discard(self, name: str) -> None:
        """Removes an item if present."""
        key = self._keys.pop(name, None)
        if key is not None:
            del self._order[bisect_left(self._order, (key, name))]
            del self._items[name]

    def best(self, count: int) -> list[T]:
        """Returns the first `count` items."""
        return [self._items[name] for _, name in self._order[:count]]
