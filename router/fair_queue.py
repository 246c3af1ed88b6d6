"""Turns among clients: the virtual token counter (Sheng et al., OSDI 2024, arXiv 2401.00588).

    charge (a prompt's tokens when it is dispatched, output as it comes) --> TokenCounters
                                                                                  | least first
    push --> FairQueue of each priority --> PriorityQueue.head --> pop

Each client's counter holds the tokens that it has had, divided by its weight, and the client that has had
least is next. So clients that always have something queued get shares of the tokens as their weights are,
however many requests they send, however long and with however many choices; a client that is alone never
waits for its own turn.

Within a client its users take turns, one item each: names of users are what requests say, and give a client
no more than its share."""

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

from ..core.sharing import FLOOR

T = TypeVar("T")

OUTPUT_TOKEN = 2.0  # prompt tokens that an output token counts as, as in the paper
MAX_CLIENTS = 8192  # whose counters are kept


class TokenCounters:
    """The tokens that each client has had. One whose counter is forgotten starts level with the others."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._floor = 0.0  # of the client served last

    def of(self, client: str) -> float:
        return self._counters.get(client, 0.0)

    def charge(self, client: str, num_tokens: float) -> None:
        """Charges a client for tokens, of which output counts for `OUTPUT_TOKEN`, divided by its weight."""
        self._counters[client] = self._counters.get(client, 0.0) + num_tokens

    def enter(self, client: str, least: float | None) -> None:
        """The client has something queued again: its time without counts as used. `least`: the counter of the
        waiting client that has had least, None when nobody waits."""
        self._counters[client] = max(self.of(client), self._floor if least is None else least)
        if len(self._counters) > MAX_CLIENTS:
            self._forget()

    def served(self, client: str) -> None:
        self._floor = max(self._floor, self.of(client))

    def _forget(self) -> None:
        """Forgets half of the clients, those first that would be raised when they come back."""
        behind = sorted(self._counters.items(), key=lambda entry: entry[1])
        self._counters = dict(behind[len(behind) // 2 :])


class _Lane(Generic[T]):
    """The items that one client has queued."""

    __slots__ = ("number", "of_users")

    def __init__(self, number: int) -> None:
        self.number = number
        # user -> id of an item -> item; each in order, and none empty
        self.of_users: OrderedDict[str, OrderedDict[int, T]] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        for items in self.of_users.values():
            yield from items.values()

    def push(self, user: str, item: T, is_first: bool) -> None:
        items = self.of_users.setdefault(user, OrderedDict())
        items[id(item)] = item
        if is_first:
            items.move_to_end(id(item), last=False)
            self.of_users.move_to_end(user, last=False)

    def first(self) -> T:
        return next(iter(self))

    def remove(self, user: str, item: T) -> bool:
        """Takes an item out, after which the user's others wait for the other users; returns False when it is
        absent."""
        items = self.of_users.get(user)
        if items is None or items.pop(id(item), None) is None:
            return False
        if items:
            self.of_users.move_to_end(user)
        else:
            del self.of_users[user]
        return True


class FairQueue(Generic[T]):
    """Items of many clients. Push, pop and removal take constant time; `head` the logarithm of the number of
    clients."""

    def __init__(
        self,
        counters: TokenCounters,
        may_go: Callable[[T], bool] = lambda item: True,
        user_of: Callable[[T], str] = lambda item: "",
    ) -> None:
        """`may_go`: whether an item may be taken out now; its client is passed over while its first may
        not."""
        self._counters = counters
        self._may_go = may_go
        self._user_of = user_of
        self._lanes: OrderedDict[str, _Lane[T]] = OrderedDict()
        # (counter when it was entered, number of the lane, client): counters only grow
        self._order: list[tuple[float, int, str]] = []
        self._held: dict[str, _Lane[T]] = {}  # out of the order until `reconsider`
        self._numbers = count()

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[T]:
        for lane in self._lanes.values():
            yield from lane

    def firsts(self) -> Iterator[T]:
        """Yields each client's first item, if it may go."""
        firsts = (lane.first() for lane in self._lanes.values())
        return (item for item in firsts if self._may_go(item))

    def push(self, client: str, item: T, *, is_first: bool = False) -> None:
        """Adds an item; `is_first`: ahead of its client's other items."""
        lane = self._lanes.get(client)
        if lane is None:
            first = self._first()
            self._counters.enter(client, None if first is None else self._counters.of(first))
            lane = self._lanes[client] = _Lane(next(self._numbers))
            heappush(self._order, (self._counters.of(client), lane.number, client))
        lane.push(self._user_of(item), item, is_first)

    def head(self) -> T | None:
        """Returns the first item of the client that has had least, of those that may go."""
        while (client := self._first()) is not None:
            lane = self._lanes[client]
            item = lane.first()
            if self._may_go(item):
                return item
            heappop(self._order)
            self._held[client] = lane
        return None

    def _first(self) -> str | None:
        """Returns the client that has had least, and puts it first in the order."""
        while self._order:
            counter, number, client = self._order[0]
            lane = self._lanes.get(client)
            if lane is None or lane.number != number:
                heappop(self._order)
            elif self._counters.of(client) > counter:
                heapreplace(self._order, (self._counters.of(client), number, client))
            else:
                return client
        return None

    def reconsider(self) -> None:
        """Returns clients to the order that were passed over."""
        for client, lane in list(self._held.items()):
            if self._may_go(lane.first()):
                del self._held[client]
                heappush(self._order, (self._counters.of(client), lane.number, client))

    def remove(self, client: str, item: T) -> bool:
        """Takes an item out; returns False when it is absent."""
        lane = self._lanes.get(client)
        if lane is None or not lane.remove(self._user_of(item), item):
            return False
        if not lane.of_users:
            del self._lanes[client]
            self._held.pop(client, None)
        return True


class PriorityQueue(Generic[T]):
    """A `FairQueue` for each priority, the lowest number first, except for one place in `FLOOR`: that goes to
    the priority behind it that has waited longest."""

    def __init__(
        self,
        counters: TokenCounters,
        may_go: Callable[[T], bool] = lambda item: True,
        user_of: Callable[[T], str] = lambda item: "",
    ) -> None:
        self._counters = counters
        self._may_go = may_go
        self._user_of = user_of
        self._queues: dict[int, FairQueue[T]] = {}
        self._priorities: list[int] = []  # sorted
        self._size = 0
        self._num_queued: Counter[str] = Counter()  # by client
        self._num_popped = 0
        self._num_since_floor = 0  # places that others have had while a lower priority waited
        self._popped: dict[int, int] = {}  # priority -> `_num_popped` when it was last served, or came

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        for priority in self._priorities:
            yield from self._queues[priority]

    @property
    def is_floor_due(self) -> bool:
        """Whether the next place is a lower priority's."""
        return self._num_since_floor + 1 >= FLOOR

    def num_queued(self, client: str) -> int:
        return self._num_queued[client]

    def firsts(self) -> Iterator[T]:
        """Yields the first item of each client and priority that may go, the lowest number first."""
        for priority in self._priorities:
            yield from self._queues[priority].firsts()

    def push(self, priority: int, client: str, item: T, *, is_first: bool = False) -> None:
        """Adds an item; `is_first`: ahead of the others of its client and priority."""
        if priority not in self._queues:
            self._queues[priority] = FairQueue(self._counters, self._may_go, self._user_of)
            insort(self._priorities, priority)
            self._popped[priority] = self._num_popped
        self._queues[priority].push(client, item, is_first=is_first)
        self._num_queued[client] += 1
        self._size += 1

    def head(self) -> T | None:
        """Returns the item whose turn it is; the same one until one is taken out or charged for."""
        first = next((head for p in self._priorities if (head := self._queues[p].head()) is not None), None)
        if not self.is_floor_due or len(self._priorities) < 2:
            return first
        for priority in sorted(self._priorities[1:], key=lambda p: self._popped[p]):
            head = self._queues[priority].head()
            if head is not None:
                return head
        return first

    def reconsider(self) -> None:
        """Returns clients to the order that were passed over."""
        for queue in self._queues.values():
            queue.reconsider()

    def pop(self, priority: int, client: str, item: T, *, passes: bool = False) -> None:
        """Takes an item out that is served now; `passes`: one of lower priority waits elsewhere."""
        self._num_popped += 1
        self._popped[priority] = self._num_popped
        passes = passes or (len(self._priorities) > 1 and priority == self._priorities[0])
        self._num_since_floor = self._num_since_floor + 1 if passes else 0
        self._counters.served(client)
        self.remove(priority, client, item)

    def has_before(self, priority: int) -> bool:
        """Whether something of a higher priority waits."""
        return bool(self._priorities) and self._priorities[0] < priority

    def served_elsewhere(self, priority: int) -> None:
        """An item that waited elsewhere is served now."""
        if self.has_before(priority):
            self._num_since_floor = 0

    def remove(self, priority: int, client: str, item: T) -> bool:
        """Takes an item out; returns False when it is absent."""
        queue = self._queues.get(priority)
        if queue is None or not queue.remove(client, item):
            return False
        self._size -= 1
        self._num_queued[client] -= 1
        if not self._num_queued[client]:
            del self._num_queued[client]
        if not queue:
            del self._queues[priority], self._popped[priority]
            self._priorities.remove(priority)
        return True
