"""Turns among clients: none is starved, whatever others queue."""

from collections import Counter

from hypothesis import given, strategies as st

from pdserve.core.sharing import FLOOR
from pdserve.router.fair_queue import MAX_CLIENTS, FairQueue, PriorityQueue, TokenCounters

Item = tuple[str, int, int]  # client, number among the client's, tokens

backlogs = st.dictionaries(
    st.sampled_from("abcde"), st.lists(st.integers(1, 300), min_size=1, max_size=30), min_size=1, max_size=5
)


class Turns:
    """A queue of one priority, whose items are charged when they are taken."""

    def __init__(self, backlog: dict[str, list[int]]) -> None:
        self.counters = TokenCounters()
        self.queue: PriorityQueue[Item] = PriorityQueue(self.counters)
        self.items = [
            (client, number, cost) for client, costs in backlog.items() for number, cost in enumerate(costs)
        ]
        for item in self.items:
            self.push(item)

    def push(self, item: Item, priority: int = 0) -> None:
        self.queue.push(priority, item[0], item)

    def take(self, paid: float = 1.0, priority: int = 0) -> Item:
        item = self.queue.head()
        assert item is not None
        self.queue.pop(priority, item[0], item)
        self.counters.charge(item[0], max(1, int(item[2] * paid)))
        return item


@given(backlogs)
def test_every_item_comes_out_once_in_its_clients_order(backlog: dict[str, list[int]]) -> None:
    turns = Turns(backlog)
    assert sorted(turns.queue) == sorted(turns.items)
    taken = [turns.take() for _ in turns.items]
    assert sorted(taken) == sorted(turns.items)
    for client in backlog:
        numbers = [number for name, number, _ in taken if name == client]
        assert numbers == sorted(numbers)
    assert turns.queue.head() is None
    assert len(turns.queue) == 0


@given(backlogs, st.floats(0.1, 1.0), st.randoms(use_true_random=False))
def test_backlogged_clients_get_equal_shares_up_to_an_item(backlog, paid, rng) -> None:  # type: ignore[no-untyped-def]
    """Also when some of the cost is charged later, as output is."""
    turns = Turns(backlog)
    largest = max(cost for _, _, cost in turns.items)
    late: list[tuple[str, int]] = []
    while all(turns.queue.num_queued(client) for client in backlog):
        client, _, cost = turns.take(paid)
        late.append((client, rng.randrange(cost)))
        if rng.random() < 0.5:
            turns.counters.charge(*late.pop())
        waiting = [turns.counters.of(client) for client in backlog if turns.queue.num_queued(client)]
        num_late = sum(cost for _, cost in late) + largest
        assert max(waiting, default=0) - min(waiting, default=0) <= largest + num_late + 1


@given(st.integers(1, 50), st.integers(1, 300))
def test_a_newcomer_waits_for_at_most_one_item_of_each_other_client(num_others: int, cost: int) -> None:
    turns = Turns({f"other{number}": [cost] * 20 for number in range(num_others)})
    for _ in range(num_others + 1):
        turns.take()
    turns.push(("new", 0, 1))
    before: Counter[str] = Counter()
    while (item := turns.take())[0] != "new":
        before[item[0]] += 1
    assert max(before.values(), default=0) <= 1


def test_time_without_anything_queued_earns_nothing() -> None:
    turns = Turns({"idle": [100], "busy": [100] * 30})
    while turns.queue.num_queued("busy") > 10:
        turns.take()
    for number in range(10):
        turns.push(("idle", number, 100))
    taken = [turns.take()[0] for _ in range(10)]
    assert 4 <= taken.count("idle") <= 6


def test_a_stream_of_new_clients_does_not_starve_a_long_prompt() -> None:
    turns = Turns({"long": [640], "first": [64]})
    for number in range(40):
        turns.push((f"new{number}", 0, 64))
        if turns.take()[0] == "long":
            return
    raise AssertionError("the long prompt is starved")


@given(backlogs, st.randoms(use_true_random=False))
def test_removing_an_item_leaves_the_others(backlog: dict[str, list[int]], rng) -> None:  # type: ignore[no-untyped-def]
    turns = Turns(backlog)
    removed = {item for item in turns.items if rng.random() < 0.5}
    for item in removed:
        assert turns.queue.remove(0, item[0], item)
        assert not turns.queue.remove(0, item[0], item)
    assert {turns.take() for _ in range(len(turns.queue))} == set(turns.items) - removed


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 300))
def test_made_up_users_get_a_client_no_more_than_its_share(
    num_honest: int, num_users: int, cost: int
) -> None:
    """Each of its requests names another user; with 0 they name none. It has the largest backlog, and sends
    more for each that it gets."""
    counters = TokenCounters()
    queue: PriorityQueue[Item] = PriorityQueue(counters, user_of=lambda item: f"user{item[1]}")
    honest = [f"alice{number}" for number in range(num_honest)]
    for number in range(10 + 100 * num_users):
        queue.push(0, "mallory", ("mallory", number if num_users else 0, cost))
    for client in honest:
        for _ in range(20):
            queue.push(0, client, (client, 0, cost))
    had: Counter[str] = Counter()
    for number in range(20 * num_honest):
        item = queue.head()
        assert item is not None
        queue.pop(0, item[0], item)
        counters.charge(item[0], cost)
        had[item[0]] += 1
        if item[0] == "mallory":
            queue.push(0, "mallory", ("mallory", 10_000 + number, cost))
        assert had["mallory"] <= min(had[client] for client in honest) + 1


def test_users_of_one_client_take_turns() -> None:
    queue: PriorityQueue[Item] = PriorityQueue(TokenCounters(), user_of=lambda item: "ab"[item[1] // 10])
    for number in (0, 1, 2, 3, 10, 11):
        queue.push(0, "c", ("c", number, 1))
    queue.push(0, "c", ("c", 4, 1), is_first=True)
    taken = []
    while (item := queue.head()) is not None:
        queue.pop(0, "c", item)
        taken.append(item[1])
    assert taken == [4, 10, 0, 11, 1, 2, 3]


def test_a_client_is_passed_over_while_its_first_item_may_not_go() -> None:
    held: set[str] = {"a"}
    queue: FairQueue[str] = FairQueue(TokenCounters(), lambda item: item not in held)
    queue.push("a", "a")
    queue.push("b", "b")
    assert queue.head() == "b"
    assert list(queue.firsts()) == ["b"]
    held.clear()
    assert queue.head() == "b", "it is asked again by `reconsider` alone"
    queue.remove("b", "b")
    queue.reconsider()
    assert queue.head() == "a"


def test_counters_of_clients_that_are_gone_are_forgotten() -> None:
    counters = TokenCounters()
    for number in range(3 * MAX_CLIENTS):
        counters.enter(f"c{number}", None)
        counters.charge(f"c{number}", number)
        counters.served(f"c{number}")
    assert len(counters._counters) <= MAX_CLIENTS + 1
    assert counters.of(f"c{3 * MAX_CLIENTS - 1}")


def test_a_lower_priority_gets_one_place_in_eight() -> None:
    turns = Turns({"a": [1] * 64})
    for number in range(64):
        turns.push(("low", number, 1), priority=5)
    taken = []
    for _ in range(32):
        item = turns.queue.head()
        assert item is not None
        taken.append(item[0])
        turns.queue.pop(5 if item[0] == "low" else 0, item[0], item)
    assert taken == (["a"] * (FLOOR - 1) + ["low"]) * 4


def test_several_lower_priorities_share_the_place() -> None:
    queue: PriorityQueue[tuple[int, int]] = PriorityQueue(TokenCounters())
    for priority in (0, 1, 2):
        for number in range(64):
            queue.push(priority, "c", (priority, number))
    taken = []
    for _ in range(4 * FLOOR):
        item = queue.head()
        assert item is not None
        queue.pop(item[0], "c", item)
        taken.append(item[0])
    assert [priority for priority in taken if priority] == [1, 2, 1, 2]
