"""Turns among clients: none is starved, whatever others queue."""

from collections import Counter

from hypothesis import given, strategies as st

from pdserve.router.fair_queue import FairQueue

QUANTUM = 64
Item = tuple[str, int, int]  # client, number among the client's, tokens

backlogs = st.dictionaries(
    st.sampled_from("abcde"), st.lists(st.integers(1, 300), min_size=1, max_size=30), min_size=1, max_size=5
)


def filled(backlog: dict[str, list[int]]) -> tuple[FairQueue[Item], list[Item]]:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    items = [(client, number, cost) for client, costs in backlog.items() for number, cost in enumerate(costs)]
    for item in items:
        queue.push(item[0], item, item[2])
    return queue, items


def take(queue: FairQueue[Item], paid: float = 1.0) -> Item:
    item = queue.head()
    assert item is not None
    queue.pop(item[0], item, max(1, int(item[2] * paid)))
    return item


@given(backlogs)
def test_every_item_comes_out_once_in_its_clients_order(
    backlog: dict[str, list[int]],
) -> None:
    queue, items = filled(backlog)
    assert sorted(queue) == sorted(items)
    taken = [take(queue) for _ in items]
    assert sorted(taken) == sorted(items)
    for client in backlog:
        numbers = [number for name, number, _ in taken if name == client]
        assert numbers == sorted(numbers)
    assert queue.head() is None
    assert len(queue) == 0


@given(backlogs, st.floats(0.1, 1.0))
def test_backlogged_clients_get_equal_shares_up_to_an_item_and_a_turn(
    backlog: dict[str, list[int]], paid: float
) -> None:
    queue, items = filled(backlog)
    largest = max(cost for _, _, cost in items)
    served: Counter[str] = Counter()
    while all(queue.num_queued(client) for client in backlog):
        client, _, cost = take(queue, paid)
        served[client] += max(1, int(cost * paid))
        waiting = [served[client] for client in backlog if queue.num_queued(client)]
        assert max(waiting, default=0) - min(waiting, default=0) <= 2 * QUANTUM + largest


@given(st.integers(1, 50), st.integers(1, 300))
def test_a_newcomer_waits_for_at_most_one_turn_of_each_earlier_client(num_others: int, cost: int) -> None:
    queue, _ = filled({f"other{number}": [cost] * 20 for number in range(num_others)})
    take(queue)
    queue.push("new", ("new", 0, QUANTUM), QUANTUM)
    tokens_before = 0
    while (item := take(queue))[0] != "new":
        tokens_before += item[2]
    assert tokens_before <= num_others * max(QUANTUM, cost)


def test_a_stream_of_new_clients_does_not_starve_a_long_prompt() -> None:
    queue, _ = filled({"long": [10 * QUANTUM], "first": [QUANTUM]})
    for number in range(40):
        queue.push(f"new{number}", (f"new{number}", 0, QUANTUM), QUANTUM)
        if take(queue)[0] == "long":
            return
    raise AssertionError("the long prompt is starved")


@given(backlogs, st.randoms(use_true_random=False))
def test_removing_an_item_leaves_the_others(backlog: dict[str, list[int]], rng) -> None:  # type: ignore[no-untyped-def]
    queue, items = filled(backlog)
    removed = {item for item in items if rng.random() < 0.5}
    for item in removed:
        assert queue.remove(item[0], item)
        assert not queue.remove(item[0], item)
    assert {take(queue) for _ in range(len(queue))} == set(items) - removed
