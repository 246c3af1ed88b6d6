"""Admission of requests, and the reasons why they wait."""

import msgspec
import pytest

from pdserve.core.errors import DuplicateRequest, NoWorkerAvailable, QueueFull
from pdserve.core.messages import Leg, Serve, StepReport, WorkerLoad
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import Cancel, Submit, WorkersExpected

from .cluster import Cluster, make_request, worker_info

PAIRS_ONLY = RouterConfig(prefill_on_decode_factor=None)


def full(max_queued_requests: int = 2) -> Cluster:
    """A cluster of one worker whose room for one sequence is taken."""
    cluster = Cluster(
        worker_info("both-0", max_batch_size=1), config=RouterConfig(max_queued_requests=max_queued_requests)
    )
    cluster.submit(make_request("running"))
    return cluster


def test_a_full_queue_refuses_with_a_retry_delay() -> None:
    cluster = full()
    cluster.submit(make_request("a"))
    cluster.submit(make_request("b"))
    with pytest.raises(QueueFull) as error:
        cluster.submit(make_request("c"))
    assert error.value.limit == 2
    assert error.value.retry_after_s > 0
    assert cluster.router.status(0.0).counters.rejected == 1
    assert cluster.router.status(0.0).num_requests == 3


def test_the_retry_delay_grows_with_the_backlog_at_the_pace_of_dispatches() -> None:
    cluster = full(max_queued_requests=4)
    for name in ("a", "b", "c", "d"):
        cluster.submit(make_request(name, max_tokens=1))
    for _ in range(2):
        cluster.now_s += 3.0
        cluster.token("both-0", 0, FinishReason.LENGTH)
        cluster.leg_ended("both-0", Leg.DECODE)
    cluster.submit(make_request("e"))
    cluster.submit(make_request("f"))
    with pytest.raises(QueueFull) as error:
        cluster.submit(make_request("g"))
    assert error.value.retry_after_s == pytest.approx(4 * 3.0)


def test_a_live_id_is_refused_and_its_request_continues() -> None:
    cluster = full()
    with pytest.raises(DuplicateRequest):
        cluster.submit(make_request("running"))
    cluster.token("both-0", 0)
    assert cluster.tokens["running", 0] == [0]


def test_a_request_waits_for_a_loading_worker_and_is_refused_without_one() -> None:
    cluster = Cluster()
    with pytest.raises(NoWorkerAvailable):
        cluster.submit(make_request())
    cluster.handle(WorkersExpected(2))
    cluster.submit(make_request())
    cluster.add(worker_info("both-0"))
    assert isinstance(cluster.last("both-0"), Serve)


def test_a_request_too_large_for_every_worker_is_refused() -> None:
    cluster = Cluster(worker_info("prefill-0", num_blocks=4), worker_info("decode-0", num_blocks=4))
    with pytest.raises(NoWorkerAvailable, match="can hold the 65 tokens"):
        cluster.submit(make_request(num_tokens=60, max_tokens=5))
    cluster.submit(make_request(num_tokens=60, max_tokens=4))
    assert cluster.sent["decode-0"]


def test_a_request_that_waits_for_a_bigger_worker_delays_no_others() -> None:
    cluster = Cluster(worker_info("both-0", num_blocks=4))
    cluster.handle(WorkersExpected(1))
    cluster.submit(make_request("big", num_tokens=100))
    cluster.submit(make_request("small"))
    assert cluster.spec("both-0").transfer.request_id == "small"
    cluster.add(worker_info("both-1"))
    assert cluster.spec("both-1").transfer.request_id == "big"


def test_requests_are_dispatched_first_come_first_served_when_room_comes() -> None:
    cluster = full()
    cluster.submit(make_request("a"))
    cluster.submit(make_request("b"))
    cluster.token("both-0", 0, FinishReason.STOP)
    cluster.leg_ended("both-0", Leg.DECODE)
    assert cluster.spec("both-0").transfer.request_id == "a"
    assert cluster.router.status(0.0).num_queued == 1


def test_a_queued_request_whose_deadline_passes_never_costs_a_prefill() -> None:
    cluster = full()
    cluster.submit(make_request("late", deadline_s=1.0))
    cluster.now_s = 2.0
    cluster.token("both-0", 0, FinishReason.STOP)
    cluster.leg_ended("both-0", Leg.DECODE)
    assert cluster.choice_ends["late", 0] == [FinishReason.DEADLINE]
    assert cluster.spec("both-0").transfer.request_id == "running"
    assert len(cluster.closed["late"]) == 1


def test_a_cancelled_request_leaves_the_queue() -> None:
    cluster = full()
    cluster.submit(make_request("a"))
    cluster.handle(Cancel("a"))
    assert cluster.router.status(0.0).num_queued == 0
    assert len(cluster.closed["a"]) == 1


def test_a_choice_cancelled_in_the_queue_is_not_dispatched() -> None:
    cluster = full()
    cluster.submit(make_request("a", n=2))
    cluster.handle(Cancel("a", FinishReason.STOP, choice=0))
    cluster.lose("both-0")
    cluster.add(worker_info("both-0", incarnation=2))
    specs = {c.spec.transfer.request_id: c.spec for c in cluster.sent["both-0"] if isinstance(c, Serve)}
    assert specs["a"].choices == (1,)


def test_prompts_wait_in_the_router_when_ps_backlog_is_long_enough() -> None:
    config = RouterConfig(max_prefill_backlog_tokens=30, prefill_on_decode_factor=None)
    cluster = Cluster("prefill-0", "decode-0", config=config)
    for name in ("a", "b", "c"):
        cluster.submit(make_request(name))
    assert cluster.router.status(0.0).num_queued == 1
    cluster.token("prefill-0", 0, request_id="a", attempt=0)
    assert cluster.spec("prefill-0").transfer.request_id == "c"


def backlog_of_long_prompts() -> Cluster:
    """Two prompts of two steps each: P's backlog is long enough, and a third one waits."""
    config = RouterConfig(prefill_on_decode_factor=None)
    cluster = Cluster("prefill-0", worker_info("decode-0", num_blocks=2000), config=config)
    for number, name in enumerate(("long0", "long1", "long2")):
        cluster.submit(make_request(name, 4000, client="many", first_token=5000 * number))
    assert cluster.spec("prefill-0").transfer.request_id == "long1"
    return cluster


def test_a_short_prompt_does_not_wait_for_a_backlog_that_it_overtakes() -> None:
    cluster = backlog_of_long_prompts()
    cluster.submit(make_request("short", 1024, client="one"))
    assert cluster.spec("prefill-0").transfer.request_id == "short"
    cluster.submit(make_request("longer", 1025, client="two"))
    assert cluster.spec("prefill-0").transfer.request_id == "short"


def test_a_client_passes_one_that_waits_only_until_it_has_had_more() -> None:
    cluster = backlog_of_long_prompts()
    for name in ("first", "second"):
        cluster.submit(make_request(name, client="one"))
    assert cluster.spec("prefill-0").transfer.request_id == "first"
    cluster.token("prefill-0", 0, request_id="long0", attempt=0)
    assert cluster.spec("prefill-0").transfer.request_id == "second"
    assert cluster.router.status(0.0).num_queued == 0


def test_short_prompts_have_a_backlog_of_their_own_that_delays_no_long_one() -> None:
    cluster = backlog_of_long_prompts()
    for number in range(5):
        name, first_token = f"short{number}", 20_000 + 2000 * number
        cluster.submit(make_request(name, 1000, client=name, first_token=first_token))
        assert cluster.spec("prefill-0").transfer.request_id == name
    cluster.token("prefill-0", 0, request_id="long0", attempt=0)
    assert cluster.spec("prefill-0").transfer.request_id == "long2"
    cluster.submit(make_request("short5", 1000, client="short5"))
    assert cluster.spec("prefill-0").transfer.request_id == "long2"


def test_a_short_prompt_is_not_predicted_to_wait_for_long_ones() -> None:
    cluster = backlog_of_long_prompts()
    cluster.submit(make_request("short", 100, client="one"))
    timeline = cluster.router.timeline("short", cluster.now_s)
    other = cluster.router.timeline("long1", cluster.now_s)
    assert timeline is not None and other is not None
    assert timeline.dispatches[0].expected_queue_s < other.dispatches[0].expected_queue_s / 1.5


def test_a_decode_workers_sequences_fit_its_batch_and_its_blocks() -> None:
    by_batch = Cluster("prefill-0", worker_info("decode-0", max_batch_size=2), config=PAIRS_ONLY)
    by_blocks = Cluster("prefill-0", worker_info("decode-0", num_blocks=8), config=PAIRS_ONLY)
    for cluster in (by_batch, by_blocks):
        for name in ("a", "b", "c"):
            cluster.submit(make_request(name, num_tokens=40))
        assert cluster.router.status(0.0).num_queued == 1


def test_a_worker_that_shares_prefixes_is_believed_when_it_reports_free_blocks() -> None:
    cluster = Cluster("prefill-0", worker_info("decode-0", num_blocks=8), config=PAIRS_ONLY)
    for name in ("a", "b", "c"):
        cluster.submit(make_request(name, num_tokens=40))
    for attempt, name in enumerate(("a", "b")):
        cluster.token("prefill-0", 0, request_id=name, attempt=attempt)
        cluster.token("decode-0", 1, request_id=name, attempt=attempt)
    load = WorkerLoad(num_running=2, num_free_blocks=5)
    cluster.handle(StepReport(worker_id="decode-0", incarnation=1, load=load))
    assert cluster.router.status(0.0).num_queued == 0


def test_limits_can_change_while_requests_run() -> None:
    cluster = full(max_queued_requests=1)
    cluster.submit(make_request("a"))
    cluster.router.configure(RouterConfig(max_queued_requests=2))
    cluster.submit(make_request("b"))
    with pytest.raises(QueueFull):
        cluster.submit(make_request("c"))


@pytest.mark.parametrize("workers", [["both-0"], ["prefill-0", "decode-0"]])
def test_a_request_larger_than_the_free_room_runs_on_an_empty_worker(workers: list[str]) -> None:
    cluster = Cluster(*(worker_info(name, num_blocks=8) for name in workers))
    cluster.submit(make_request("a", num_tokens=100, max_tokens=20))
    cluster.submit(make_request("b", num_tokens=100, max_tokens=28))
    cluster.handle(Cancel("a"))
    assert cluster.router.status(0.0).num_queued == 1
    cluster.leg_ended(workers[0], Leg.PREFILL, "aborted", transfer=TransferId("a", 0))
    cluster.leg_ended(workers[-1], Leg.DECODE, "aborted", transfer=TransferId("a", 0))
    assert cluster.spec(workers[-1]).transfer.request_id == "b"


def test_a_refused_request_leaves_nothing_behind() -> None:
    router = Router()
    with pytest.raises(NoWorkerAvailable):
        router.handle(Submit(make_request()), 0.0)
    router.check_integrity()
    assert router.status(0.0).num_requests == 0
    assert router.next_tick_s() is None


def test_running_requests_of_a_scope_are_listed_newest_first() -> None:
    cluster = Cluster("both-0")
    for name in ("alice/1", "bob/1", "alice/2", "alice/3"):
        cluster.submit(make_request(name))
    found = cluster.router.timelines(2, "alice/", 1.0)
    assert [timeline.request_id for timeline in found] == ["alice/3", "alice/2"]
    assert len(cluster.router.timelines(9, "", 1.0)) == 4


def test_only_a_running_request_has_a_timeline() -> None:
    cluster = Cluster("both-0")
    cluster.submit(msgspec.structs.replace(make_request("r"), user="alice", client="key:alice"))
    timeline = cluster.router.timeline("r", 1.0)
    assert timeline is not None
    assert (timeline.outcome, timeline.ended_s, timeline.num_prompt_tokens) == (None, 1.0, 20)
    assert (timeline.user, timeline.client) == ("alice", "key:alice")
    cluster.handle(Cancel("r"))
    cluster.leg_ended("both-0", Leg.DECODE, "aborted")
    assert cluster.router.timeline("r", 2.0) is None
    assert cluster.closed["r"][0].timeline.outcome is FinishReason.CANCELLED
