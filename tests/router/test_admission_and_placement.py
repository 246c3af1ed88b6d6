"""Who gets in, who waits, and where work goes."""

import msgspec
import pytest

from pdserve.core.errors import DuplicateRequest, NoWorkerAvailable, QueueFull
from pdserve.core.latency import LatencyModel, LatencyPriors
from pdserve.core.messages import Leg, Prefill, Reserve, Serve, StepReport, WorkerLoad
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import Cancel, Submit, WorkersExpected

from .cluster import Cluster, make_request, prefix_hashes, worker_info

PAIRS_ONLY = RouterConfig(prefill_on_decode_factor=None)


def full(max_queued_requests: int = 2) -> Cluster:
    """One worker with room for one sequence, which it has."""
    cluster = Cluster(worker_info("both-0", max_batch_size=1), config=RouterConfig(max_queued_requests=max_queued_requests))
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


def test_a_live_id_is_refused_and_the_request_it_names_goes_on() -> None:
    cluster = full()
    with pytest.raises(DuplicateRequest):
        cluster.submit(make_request("running"))
    cluster.token("both-0", 0)
    assert cluster.tokens["running", 0] == [0]


def test_without_any_worker_a_request_is_refused_but_waits_for_one_that_is_loading() -> None:
    cluster = Cluster()
    with pytest.raises(NoWorkerAvailable):
        cluster.submit(make_request())
    cluster.handle(WorkersExpected(2))
    cluster.submit(make_request())
    cluster.add(worker_info("both-0"))
    assert isinstance(cluster.last("both-0"), Serve)


def test_a_request_that_no_worker_could_ever_hold_is_refused_while_others_are_served() -> None:
    cluster = Cluster(worker_info("prefill-0", num_blocks=4), worker_info("decode-0", num_blocks=4))
    with pytest.raises(NoWorkerAvailable, match="can hold the 65 tokens"):
        cluster.submit(make_request(num_tokens=60, max_tokens=5))
    cluster.submit(make_request(num_tokens=60, max_tokens=4))
    assert cluster.sent["decode-0"]


def test_a_request_that_waits_for_a_bigger_worker_does_not_hold_up_those_behind_it() -> None:
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


def test_a_decode_worker_gets_no_more_sequences_than_its_batch_or_its_blocks_hold() -> None:
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


def test_prompts_go_to_the_prefill_worker_with_the_shortest_queue() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request("a", num_tokens=500))
    cluster.submit(make_request("b", num_tokens=100))
    cluster.submit(make_request("c", num_tokens=50))
    assert cluster.spec("prefill-0").transfer.request_id == "a"
    assert [c.spec.transfer.request_id for c in cluster.sent["prefill-1"] if isinstance(c, Prefill)] == ["b", "c"]


def test_streams_go_to_the_least_loaded_decode_worker() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1", config=PAIRS_ONLY)
    for name in ("a", "b", "c"):
        cluster.submit(make_request(name))
    assert [len(cluster.sent["decode-0"]), len(cluster.sent["decode-1"])] == [2, 1]


def test_a_cached_prefix_draws_its_prompts_until_the_queue_there_costs_more() -> None:
    cluster = Cluster("prefill-0", "prefill-1", worker_info("decode-0", num_blocks=10_000), config=PAIRS_ONLY)
    cluster.hold_prefix("prefill-1", make_request(num_tokens=400))
    for i in range(5):
        cluster.submit(make_request(f"a{i}", num_tokens=400))
    assert (len(cluster.sent["prefill-0"]), len(cluster.sent["prefill-1"])) == (0, 5)
    for i in range(20):
        cluster.submit(make_request(f"b{i}", num_tokens=400))
    assert cluster.sent["prefill-0"]


def test_a_prompt_that_is_computed_as_a_whole_is_not_drawn_by_its_cached_prefix() -> None:
    cluster = Cluster("prefill-0", "prefill-1", worker_info("decode-0", num_blocks=10_000), config=PAIRS_ONLY)
    request = make_request(num_tokens=400)
    cluster.hold_prefix("prefill-1", request)
    for name in ("a", "b"):
        sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=0)
        cluster.submit(msgspec.structs.replace(request, request_id=name, sampling=sampling))
    assert (len(cluster.sent["prefill-0"]), len(cluster.sent["prefill-1"])) == (1, 1)


def test_a_prefix_of_another_salt_is_not_a_prefix() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.hold_prefix("prefill-1", make_request("a", num_tokens=400, salt="alice"))
    cluster.submit(make_request("a", num_tokens=400, salt="bob"))
    assert cluster.sent["prefill-0"]


def test_evicted_blocks_and_lost_workers_hold_no_prefix() -> None:
    request = make_request("a", num_tokens=400)
    for forget in ("evict", "lose"):
        cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
        cluster.hold_prefix("prefill-1", request)
        if forget == "evict":
            cluster.report("prefill-1", evicted=prefix_hashes(request))
        else:
            cluster.lose("prefill-1")
            cluster.add(worker_info("prefill-1", incarnation=2))
        cluster.submit(request)
        assert cluster.sent["prefill-0"], forget


def test_a_prompt_whose_prefix_d_holds_is_prefilled_there() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    request = make_request("a", num_tokens=1000)
    cluster.hold_prefix("decode-0", request)
    cluster.submit(request)
    assert isinstance(cluster.last("decode-0"), Serve)
    assert cluster.router.status(0.0).counters.served_on_one == 1


def test_a_prompt_is_prefilled_on_d_when_ps_queue_is_long() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.submit(make_request("a", num_tokens=2000))
    assert isinstance(cluster.last("decode-0"), Reserve)
    cluster.submit(make_request("b", num_tokens=20, first_token=5000))
    assert isinstance(cluster.last("decode-0"), Serve)


def test_no_prefill_on_d_that_would_hold_its_streams_up_beyond_the_slo() -> None:
    model = LatencyModel(LatencyPriors(prefill_token_s=1e-3))
    router = Router(RouterConfig(itl_slo_s=0.05), model)
    cluster = Cluster("prefill-0", "decode-0")
    cluster.router = router
    for worker_id in ("prefill-0", "decode-0"):
        cluster.add(worker_info(worker_id))
    cluster.submit(make_request("a", num_tokens=2000))
    cluster.submit(make_request("b", num_tokens=100, first_token=5000))
    assert cluster.spec("prefill-0").transfer.request_id == "b"


def test_workers_that_keep_the_itl_inside_the_slo_come_first() -> None:
    slow = LatencyModel(LatencyPriors(decode_context_token_s=1e-4))
    cluster = Cluster()
    cluster.router = Router(RouterConfig(itl_slo_s=0.05, prefill_on_decode_factor=None), slow)
    busy = worker_info("decode-0", max_batch_size=1000, num_blocks=10_000)
    for info in (worker_info("prefill-0"), busy):
        cluster.add(info)
    cluster.submit(make_request("a", num_tokens=450))
    cluster.add(worker_info("decode-1", max_batch_size=3))
    for name in ("b", "c"):
        cluster.submit(make_request(name, num_tokens=100))
    assert [c.spec.transfer.request_id for c in cluster.sent["decode-1"]] == ["b", "c"]


def test_workers_of_another_model_are_never_paired() -> None:
    cluster = Cluster(worker_info("prefill-0", fingerprint="x"), worker_info("decode-0", fingerprint="y"))
    cluster.submit(make_request())
    assert not cluster.sent["prefill-0"]
    assert isinstance(cluster.last("decode-0"), Serve)


def test_the_model_learns_from_reports_and_status_shows_loads() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.handle(StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad(num_running=3, num_free_blocks=7)))
    row = {worker.worker_id: worker for worker in cluster.router.status(0.0).workers}["decode-0"]
    assert (row.load.num_running, row.load.num_free_blocks, row.num_blocks) == (3, 7, 256)


def test_limits_can_change_while_requests_run() -> None:
    cluster = full(max_queued_requests=1)
    cluster.submit(make_request("a"))
    cluster.router.configure(RouterConfig(max_queued_requests=2))
    cluster.submit(make_request("b"))
    with pytest.raises(QueueFull):
        cluster.submit(make_request("c"))


@pytest.mark.parametrize("workers", [["both-0"], ["prefill-0", "decode-0"]])
def test_a_request_larger_than_what_is_free_runs_once_the_worker_is_empty(workers: list[str]) -> None:
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


def test_a_timeline_has_the_best_few_places_with_the_chosen_one_first_and_what_was_predicted() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", "decode-1", config=RouterConfig(prefill_on_decode_factor=None))
    cluster.submit(make_request("ahead", 2000, max_tokens=2))
    cluster.submit(make_request("r", 2000, max_tokens=2))
    timeline = cluster.router.timeline("r", 0.0)
    assert timeline is not None
    (dispatch,) = timeline.dispatches
    chosen, *others = dispatch.considered
    assert (chosen.prefill_worker, chosen.decode_worker) == (dispatch.prefill_worker, dispatch.decode_worker)
    assert len(others) == 3
    scores = [(p.has_failed, p.itl_excess_s, p.cost_s, p.load) for p in dispatch.considered]
    assert scores == sorted(scores)
    assert {place.prefill_worker for place in dispatch.considered} == {"prefill-0", "prefill-1"}
    assert (dispatch.expected_queue_s, dispatch.expected_ttft_s) == (0.0, chosen.ttft_s)
    assert chosen.cost_s == pytest.approx(dispatch.expected_ttft_s + dispatch.expected_transfer_s)
    assert dispatch.expected_itl_s > 0


def test_a_running_request_can_be_asked_for_and_an_ended_one_not() -> None:
    cluster = Cluster("both-0")
    cluster.submit(make_request("r"))
    timeline = cluster.router.timeline("r", 1.0)
    assert timeline is not None
    assert (timeline.outcome, timeline.ended_s, timeline.num_prompt_tokens) == (None, 1.0, 20)
    cluster.handle(Cancel("r"))
    cluster.leg_ended("both-0", Leg.DECODE, "aborted")
    assert cluster.router.timeline("r", 2.0) is None
    assert cluster.closed["r"][0].timeline.outcome is FinishReason.CANCELLED
