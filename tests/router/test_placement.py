"""Placement by queues, loads, cached prefixes, and predictions for a place."""

from typing import cast

import msgspec
import pytest

from pdserve.core.latency import LatencyModel, LatencyPriors
from pdserve.core.messages import Prefill, Reserve, Serve, StepReport, WorkerLoad
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router

from .cluster import Cluster, make_request, prefix_hashes, worker_info

PAIRS_ONLY = RouterConfig(prefill_on_decode_factor=None)


def test_prompts_go_to_the_prefill_worker_with_the_shortest_queue() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request("a", num_tokens=500))
    cluster.submit(make_request("b", num_tokens=100))
    cluster.submit(make_request("c", num_tokens=50))
    assert cluster.spec("prefill-0").transfer.request_id == "a"
    assert [c.spec.transfer.request_id for c in cluster.sent["prefill-1"] if isinstance(c, Prefill)] == [
        "b",
        "c",
    ]


def test_streams_go_to_the_least_loaded_decode_worker() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1", config=PAIRS_ONLY)
    for name in ("a", "b", "c"):
        cluster.submit(make_request(name))
    assert [len(cluster.sent["decode-0"]), len(cluster.sent["decode-1"])] == [2, 1]


def test_a_cached_prefix_attracts_prompts_until_the_queue_costs_more() -> None:
    cluster = Cluster("prefill-0", "prefill-1", worker_info("decode-0", num_blocks=10_000), config=PAIRS_ONLY)
    cluster.hold_prefix("prefill-1", make_request(num_tokens=400))
    for i in range(5):
        cluster.submit(make_request(f"a{i}", num_tokens=400))
    assert (len(cluster.sent["prefill-0"]), len(cluster.sent["prefill-1"])) == (0, 5)
    for i in range(20):
        cluster.submit(make_request(f"b{i}", num_tokens=400))
    assert cluster.sent["prefill-0"]


def test_a_fully_computed_prompt_ignores_its_cached_prefix() -> None:
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


def test_no_prefill_on_d_delays_its_streams_beyond_the_slo() -> None:
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
    assert [c.spec.transfer.request_id for c in cast(list[Reserve], cluster.sent["decode-1"])] == ["b", "c"]


def test_workers_of_another_model_are_never_paired() -> None:
    cluster = Cluster(worker_info("prefill-0", fingerprint="x"), worker_info("decode-0", fingerprint="y"))
    cluster.submit(make_request())
    assert not cluster.sent["prefill-0"]
    assert isinstance(cluster.last("decode-0"), Serve)


def test_the_model_learns_from_reports_and_status_shows_loads() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.handle(
        StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad(num_running=3, num_free_blocks=7))
    )
    row = {worker.worker_id: worker for worker in cluster.router.status(0.0).workers}["decode-0"]
    assert (row.load.num_running, row.load.num_free_blocks, row.num_blocks) == (3, 7, 256)


def test_a_timeline_has_the_best_places_and_their_predictions_chosen_first() -> None:
    cluster = Cluster(
        "prefill-0", "prefill-1", "decode-0", "decode-1", config=RouterConfig(prefill_on_decode_factor=None)
    )
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
