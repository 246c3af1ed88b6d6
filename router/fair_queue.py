"""Turns among clients: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) over each client's own
queue.

A client's turn is worth `quantum` tokens; what a turn leaves is kept while the client has something queued.
So of N clients each gets at least about 1/N of the tokens, however many requests another has queued and
however long they are, and a client that is alone never waits for its own turn."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

QUANTUM_TOKENS = 512


class _Lane(Generic[T]):
    """What one client has queued, oldest first. `credit` holds the coming turn's quantum already."""

    __slots__ = ("credit", "items")

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.items: OrderedDict[int, tuple[T, int]] = OrderedDict()  # id -> item and its greatest cost


class FairQueue(Generic[T]):
    """Items of many clients. A push, a look, a pop and a removal take constant time, apart from the turns
    that an item larger than the quantum has to wait for."""

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._lanes: OrderedDict[str, _Lane[T]] = OrderedDict()  # whose turn it is, then who comes next
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        for lane in self._lanes.values():
            yield from (item for item, _ in lane.items.values())

    def firsts(self) -> Iterator[T]:
        """Each client's first item, by turns."""
        return (next(iter(lane.items.values()))[0] for lane in self._lanes.values())

    def num_queued(self, client: str) -> int:
        lane = self._lanes.get(client)
        return len(lane.items) if lane is not None else 0

    def push(self, client: str, item: T, max_cost: int, *, is_first: bool = False) -> None:
        """`max_cost`: the most that a `pop` can charge for the item. `is_first`: of its client's."""
        lane = self._lanes.get(client)
        if lane is None:
            lane = self._lanes[client] = _Lane(self._quantum)
        lane.items[id(item)] = item, max_cost
        if is_first:
            lane.items.move_to_end(id(item), last=False)
        self._size += 1

    def head(self) -> T | None:
        """Whose turn it is; the same until it is taken out."""
        while self._lanes:
            client, lane = next(iter(self._lanes.items()))
            item, max_cost = next(iter(lane.items.values()))
            if lane.credit >= max_cost or len(self._lanes) == 1:
                return item
            lane.credit += self._quantum
            self._lanes.move_to_end(client)
        return None

    def pop(self, client: str, item: T, cost: int) -> None:
        """Take the head out and charge its client what it turned out to cost."""
        lane = self._lanes[client]
        lane.credit = max(0, lane.credit - cost)  # below only when nobody else waited
        self.remove(client, item)

    def remove(self, client: str, item: T) -> bool:
        """Take an item out free of charge; False when it is not there."""
        lane = self._lanes.get(client)
        if lane is None or lane.items.pop(id(item), None) is None:
            return False
        self._size -= 1
        if not lane.items:
            del self._lanes[client]
        return True
