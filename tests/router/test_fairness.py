"""Turns, shares, bounds and priorities of clients whose requests wait."""

import msgspec
import pytest

from pdserve.core.errors import QueueFull
from pdserve.core.messages import Leg
from pdserve.core.request import FinishReason, Request, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.live_request import DispatchState

from .cluster import Cluster, make_request, worker_info
from .overloaded import finish, one_at_a_time, request_of


def test_a_single_request_waits_for_one_request_of_another_client() -> None:
    cluster = one_at_a_time()
    for number in range(100):
        cluster.submit(request_of("many", f"m{number}", 256, max_tokens=1))
    cluster.submit(request_of("one", "single", max_tokens=1))
    served = [finish(cluster) for _ in range(4)]
    assert served == ["m0", "single", "m1", "m2"]


def test_short_and_long_prompts_of_two_clients_both_progress() -> None:
    cluster = one_at_a_time()
    for number in range(3):
        cluster.submit(request_of("long", f"long{number}", 2000, max_tokens=1, first_token=5000 * number))
    for number in range(200):
        cluster.submit(request_of("short", f"short{number}", 50, max_tokens=1))
    served = [finish(cluster) for _ in range(150)]
    first, second, third = (served.index(f"long{number}") for number in range(3))
    assert first <= 50
    assert 20 <= second - first <= 50
    assert 20 <= third - second <= 50


def test_a_full_queue_keeps_places_for_clients_that_have_nothing_in_it() -> None:
    cluster = one_at_a_time(max_queued_requests=16)
    for number in range(14):
        cluster.submit(request_of("many", f"m{number}"))
    with pytest.raises(QueueFull):
        cluster.submit(request_of("many", "m14"))
    cluster.submit(request_of("a", "a"))
    cluster.submit(request_of("b", "b"))
    with pytest.raises(QueueFull):
        cluster.submit(request_of("c", "c"))


def test_retries_go_first_and_are_not_charged_again() -> None:
    cluster = Cluster("both-0")
    cluster.submit(request_of("a", "a", 500))
    cluster.lose("both-0")
    cluster.submit(request_of("b", "b"))
    cluster.add(worker_info("both-0", incarnation=2, max_batch_size=1))
    assert cluster.spec("both-0").transfer == TransferId("a", 1)


def shares(*specs: tuple[str, int, int, int, float], num_tokens: int = 20_000) -> dict[str, int]:
    """Serves backlogged clients of (name, prompt tokens, output tokens, choices, weight), four choices at a
    time, until one of them has had `num_tokens`; returns what each has had, by the queue's measure."""
    cluster = Cluster(worker_info("both-0", max_batch_size=4, num_blocks=4096))
    had: dict[str, int] = {name: 0 for name, *_ in specs}
    number = 0
    while max(had.values()) < num_tokens:
        for name, length, max_tokens, n, weight in specs:
            while cluster.router._queue._fair.num_queued(name) < 4:
                number += 1
                request = make_request(
                    f"{name}{number}",
                    length,
                    max_tokens=max_tokens,
                    n=n,
                    client=name,
                    first_token=number * 10_000,
                )
                cluster.submit(msgspec.structs.replace(request, weight=weight))
        worker = cluster.router._registry.get("both-0")
        assert worker is not None
        for transfer in list(worker.open_legs):
            dispatch = cluster.router._ledger.get(transfer)
            assert dispatch is not None
            spec, name = dispatch.spec, dispatch.spec.client
            if dispatch.state is DispatchState.FAILED:  # it made room for the other client
                cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=transfer)
                continue
            index = len(cluster.tokens[transfer.request_id, spec.choices[0]])
            had[name] += 2 * len(spec.choices) + (spec.num_tokens if index == 0 else 0)
            is_last = index == spec.sampling.max_tokens - 1
            for choice in spec.choices:
                reason = FinishReason.LENGTH if is_last else None
                cluster.output("both-0", transfer, index, reason, choice=choice)
            if is_last:
                cluster.leg_ended("both-0", dispatch.leg_at(worker), transfer=transfer)
    return had


@pytest.mark.parametrize(
    "other",
    [("b", 500, 50, 1, 1.0), ("b", 10, 5, 1, 1.0), ("b", 10, 50, 4, 1.0), ("b", 200, 1, 1, 1.0)],
    ids=["long prompts", "short outputs", "four choices", "prompts alone"],
)
def test_backlogged_clients_get_equal_tokens_of_prompt_and_output(
    other: tuple[str, int, int, int, float],
) -> None:
    had = shares(("a", 10, 200, 2, 1.0), other)
    assert had["a"] == pytest.approx(had["b"], rel=0.15)


def test_a_client_gets_tokens_by_its_weight() -> None:
    had = shares(("a", 10, 50, 1, 3.0), ("b", 40, 30, 1, 1.0))
    assert had["a"] == pytest.approx(3 * had["b"], rel=0.15)


def test_work_that_comes_back_is_charged_once() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(request_of("a", "a", 500, max_tokens=9))
    counters = cluster.router._queue.counters
    (first,) = (name for name, num in cluster.num_legs().items() if num)
    cluster.token(first, 0)
    assert counters.of("a") == 502
    cluster.lose(first)
    assert counters.of("a") == 502
    (second,) = (name for name, num in cluster.num_legs().items() if num)
    cluster.token(second, 0)
    cluster.token(second, 1)
    assert counters.of("a") == 504


def test_a_client_at_its_bound_waits_while_others_pass() -> None:
    cluster = Cluster(worker_info("both-0"), config=RouterConfig(max_running_per_client=2))
    for number in range(4):
        cluster.submit(request_of("a", f"a{number}"))
    cluster.submit(request_of("b", "b"))
    running = [command.spec.transfer.request_id for command in cluster.sent["both-0"]]  # type: ignore[union-attr]
    assert running == ["a0", "a1", "b"]
    transfer = TransferId("a0", 0)
    cluster.output("both-0", transfer, 0, FinishReason.STOP)
    cluster.leg_ended("both-0", Leg.DECODE, transfer=transfer)
    assert cluster.spec("both-0").transfer.request_id == "a2"


def test_one_request_may_exceed_its_clients_bound_alone() -> None:
    cluster = Cluster(worker_info("both-0"), config=RouterConfig(max_running_per_client=2))
    cluster.submit(request_of("a", "many", n=4))
    assert cluster.spec("both-0").transfer.request_id == "many"


def with_priority(request: Request, priority: int) -> Request:
    return msgspec.structs.replace(request, priority=priority)


def test_a_lower_number_is_served_first_and_displaces_a_higher_one() -> None:
    cluster = Cluster(worker_info("both-0", max_batch_size=1))
    cluster.submit(with_priority(request_of("a", "low", max_tokens=40), 5))
    cluster.submit(request_of("b", "middle"))
    assert cluster.aborts("both-0") == [TransferId("low", 0)]
    cluster.submit(with_priority(request_of("c", "high"), -5))
    cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=TransferId("low", 0))
    assert cluster.spec("both-0").transfer.request_id == "high"
    cluster.token("both-0", 0, FinishReason.STOP)
    cluster.leg_ended("both-0", Leg.DECODE)
    assert cluster.spec("both-0").transfer.request_id == "middle"


def test_a_request_gives_up_its_place_three_times_at_most() -> None:
    cluster = Cluster(worker_info("both-0", max_batch_size=1))
    cluster.submit(with_priority(request_of("a", "low", max_tokens=40), 5))
    for number in range(3):
        low = cluster.spec("both-0").transfer
        assert low.request_id == "low"
        cluster.submit(request_of("b", f"high{number}"))
        assert low in cluster.aborts("both-0")
        cluster.leg_ended("both-0", Leg.DECODE, "aborted", transfer=low)
        high = cluster.spec("both-0").transfer
        cluster.output("both-0", high, 0, FinishReason.STOP)
        cluster.leg_ended("both-0", Leg.DECODE, transfer=high)
    low = cluster.spec("both-0").transfer
    cluster.submit(request_of("b", "high3"))
    assert low not in cluster.aborts("both-0")


def test_a_large_backlog_of_high_priority_leaves_one_place_in_eight() -> None:
    cluster = one_at_a_time()
    cluster.submit(with_priority(request_of("a", "low", max_tokens=1), 5))
    for number in range(20):
        cluster.submit(with_priority(request_of("b", f"high{number}", max_tokens=1), -5))
    served = [finish(cluster) for _ in range(10)]
    assert served.index("low") == 7
