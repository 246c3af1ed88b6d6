"""Requests refused with a retry delay, or given up as their deadline would pass."""

import pytest

from pdserve.core.errors import QueueFull
from pdserve.core.messages import StepReport, WorkerLoad
from pdserve.core.request import FinishReason
from pdserve.router.config import RouterConfig
from pdserve.router.events import (
    WorkersExpected,
)

from .cluster import Cluster, make_request
from .overloaded import PAIRS_ONLY, finish, one_at_a_time, teach


def retry_after_s(cluster: Cluster) -> float:
    with pytest.raises(QueueFull) as error:
        cluster.submit(make_request("refused", 1000))
    return error.value.retry_after_s


def test_before_any_dispatch_the_retry_delay_is_predicted_from_the_backlog() -> None:
    starting = Cluster(config=RouterConfig(max_queued_requests=3))
    starting.handle(WorkersExpected(1))
    for name in "abc":
        starting.submit(make_request(name))
    assert retry_after_s(starting) == 3 * 1.0
    cold = one_at_a_time(max_queued_requests=3)
    for name in "abc":
        cold.submit(make_request(name))
    assert retry_after_s(cold) == pytest.approx(3 * cold.router.model.prefill_s(1000, 1000**2))


def test_the_delay_grows_while_nothing_is_dispatched() -> None:
    cluster = one_at_a_time(max_queued_requests=4)
    for name in "abcd":
        cluster.submit(make_request(name, max_tokens=1))
    for _ in range(2):
        cluster.now_s += 0.5
        finish(cluster)
    for name in "ef":
        cluster.submit(make_request(name))
    assert retry_after_s(cluster) == pytest.approx(4 * 0.5)
    cluster.now_s += 10.5
    assert retry_after_s(cluster) == pytest.approx(4 * 1.5)


def test_a_deadline_that_has_passed_ends_a_request_at_once() -> None:
    cluster = Cluster("both-0")
    cluster.now_s = 5.0
    cluster.submit(make_request("late", deadline_s=4.0))
    assert cluster.choice_ends["late", 0] == [FinishReason.DEADLINE]
    assert not cluster.sent["both-0"]


def behind_a_long_prompt(deadline_s: float, *, learnt: bool = True) -> Cluster:
    """A cluster in which a request with a deadline waits behind a prefill of 1000 tokens, which takes a
    second."""
    cluster = Cluster("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))
    teach(cluster, 1e-3, 40 if learnt else 2)
    cluster.submit(make_request("long", 1000))
    cluster.submit(make_request("hurried", first_token=5000, deadline_s=deadline_s))
    return cluster


def test_a_request_predicted_to_miss_its_deadline_costs_no_prefill() -> None:
    cluster = behind_a_long_prompt(deadline_s=0.3)
    assert cluster.ends["hurried"][0].finish_reason is FinishReason.DEADLINE
    assert cluster.spec("prefill-0").transfer.request_id == "long"
    assert cluster.router.counters.hopeless == 1


@pytest.mark.parametrize(("deadline_s", "learnt"), [(0.8, True), (0.3, False)])
def test_a_close_or_unlearnt_prediction_gives_up_no_request(deadline_s: float, learnt: bool) -> None:
    cluster = behind_a_long_prompt(deadline_s, learnt=learnt)
    assert cluster.spec("prefill-0").transfer.request_id == "hurried"


def test_nothing_is_given_up_before_a_worker_has_reported_what_it_caches() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))
    teach(cluster, 1e-3, 40)
    load = WorkerLoad(num_unreported_blocks=70)
    cluster.handle(StepReport(worker_id="prefill-0", incarnation=1, load=load))
    cluster.submit(make_request("long", 1000))
    cluster.submit(make_request("hurried", first_token=5000, deadline_s=0.3))
    assert cluster.spec("prefill-0").transfer.request_id == "hurried"
    cluster.report("prefill-0")  # the last of them
    cluster.submit(make_request("late", first_token=9000, deadline_s=0.3))
    assert cluster.router.counters.hopeless == 1


def test_a_request_on_an_idle_worker_corrects_a_pessimistic_model() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=PAIRS_ONLY)
    teach(cluster, 1.0, 40)
    cluster.submit(make_request("hurried", 100, deadline_s=0.5))
    assert cluster.spec("prefill-0").transfer.request_id == "hurried"
