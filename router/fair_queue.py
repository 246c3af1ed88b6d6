"""Turns among clients: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) over each client's own
queue.

A client's turn is worth `quantum` tokens; the unused part is kept while the client has something queued. So
each of N clients gets at least about 1/N of the tokens, regardless of the number and length of others'
requests, and a client that is alone never waits for its own turn."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

QUANTUM_TOKENS = 512


class _Lane(Generic[T]):
    """The items that one client has queued, oldest first. `credit` already includes the next turn's
    quantum."""

    __slots__ = ("credit", "items")

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.items: OrderedDict[int, tuple[T, int]] = OrderedDict()  # id -> item and its greatest cost


class FairQueue(Generic[T]):
    """Items of many clients. Push, peek, pop and removal take constant time, apart from the turns that an
    item larger than the quantum has to wait for."""

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._lanes: OrderedDict[str, _Lane[T]] = OrderedDict()  # in order of turns, the current one first
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        for lane in self._lanes.values():
            yield from (item for item, _ in lane.items.values())

    def firsts(self) -> Iterator[T]:
        """Yields each client's first item, in order of turns."""
        return (next(iter(lane.items.values()))[0] for lane in self._lanes.values())

    def num_queued(self, client: str) -> int:
        lane = self._lanes.get(client)
        return len(lane.items) if lane is not None else 0

    def push(self, client: str, item: T, max_cost: int, *, is_first: bool = False) -> None:
        """Adds an item. `max_cost`: the most that `pop` can charge for it. `is_first`: ahead of its client's
        other items."""
        lane = self._lanes.get(client)
        if lane is None:
            lane = self._lanes[client] = _Lane(self._quantum)
        lane.items[id(item)] = item, max_cost
        if is_first:
            lane.items.move_to_end(id(item), last=False)
        self._size += 1

    def head(self) -> T | None:
        """Returns the item whose turn it is; the same one until it is taken out."""
        while self._lanes:
            client, lane = next(iter(self._lanes.items()))
            item, max_cost = next(iter(lane.items.values()))
            if lane.credit >= max_cost or len(self._lanes) == 1:
                return item
            lane.credit += self._quantum
            self._lanes.move_to_end(client)
        return None

    def pop(self, client: str, item: T, cost: int) -> None:
        """Takes the head out and charges its client the actual cost."""
        lane = self._lanes[client]
        lane.credit = max(0, lane.credit - cost)  # negative only when nobody else waited
        self.remove(client, item)

    def remove(self, client: str, item: T) -> bool:
        """Takes an item out free of charge; returns False when it is absent."""
        lane = self._lanes.get(client)
        if lane is None or lane.items.pop(id(item), None) is None:
            return False
        self._size -= 1
        if not lane.items:
            del self._lanes[client]
        return True
