"""Requests that are refused, or given up, because no worker can serve them soon enough."""

import pytest

from pdserve.core.errors import TokensTooSlow
from pdserve.core.latency import LatencyModel, LatencyPriors
from pdserve.core.messages import Leg
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import WorkersExpected

from .cluster import Cluster, make_request, worker_info

SLOW = LatencyPriors(decode_step_s=0.03, decode_sequence_s=0.004)  # five sequences take 50 ms


def _cluster(*, enforces_itl: bool = True) -> Cluster:
    cluster = Cluster()
    config = RouterConfig(itl_slo_s=0.05, enforces_itl=enforces_itl, prefill_on_decode_factor=None)
    cluster.router = Router(config, LatencyModel(SLOW))
    for name in ("prefill-0", "decode-0"):
        cluster.add(worker_info(name, num_blocks=10_000, max_batch_tokens=1 << 16))
    return cluster


def test_a_request_that_would_slow_all_streams_beyond_the_objective_is_refused() -> None:
    cluster = _cluster()
    for index in range(4):
        cluster.submit(make_request(f"r{index}", max_tokens=100))
    with pytest.raises(TokensTooSlow) as refused:
        cluster.submit(make_request("r4", max_tokens=100))
    # one of four streams of 100 tokens ends after some 25
    assert refused.value.retry_after_s == pytest.approx(25 * 0.05, rel=0.2)
    counters = cluster.router.status(0.0).counters
    assert (counters.submitted, counters.rejected) == (4, 1)
    cluster.add(worker_info("decode-1"))
    cluster.submit(make_request("r4", max_tokens=100))
    assert cluster.spec("decode-1").transfer.request_id == "r4"


def test_without_enforcement_no_request_is_refused_for_the_objective() -> None:
    cluster = _cluster(enforces_itl=False)
    for index in range(10):
        cluster.submit(make_request(f"r{index}", max_tokens=100))
    assert cluster.router.status(0.0).counters.rejected == 0


def test_an_idle_worker_takes_a_request_whatever_is_predicted() -> None:
    cluster = Cluster()
    cluster.router = Router(
        RouterConfig(itl_slo_s=0.05, enforces_itl=True), LatencyModel(LatencyPriors(decode_step_s=10.0))
    )
    cluster.add(worker_info("both-0"))
    cluster.submit(make_request("r"))
    assert cluster.spec("both-0").transfer.request_id == "r"
    with pytest.raises(TokensTooSlow):
        cluster.submit(make_request("second"))


def test_a_wait_for_workers_that_do_not_come_is_bounded() -> None:
    cluster = Cluster(config=RouterConfig(max_wait_for_worker_s=60.0))
    cluster.handle(WorkersExpected(1))
    cluster.submit(make_request("r"))
    for _ in range(5):
        cluster.now_s += 10.0
        cluster.handle(WorkersExpected(1))  # the worker has failed to start and is tried again
    assert cluster.router.next_tick_s() == 60.0
    assert not cluster.ends["r"]
    cluster.tick(10.0)
    (end,) = cluster.ends["r"]
    assert end.finish_reason is FinishReason.ERROR
    assert end.error == "no worker that can serve the request has become ready in 60 s"
    assert cluster.router.next_tick_s() is None


def test_a_stream_whose_workers_are_gone_waits_no_longer_than_a_new_request() -> None:
    cluster = Cluster("both-0", config=RouterConfig(max_wait_for_worker_s=60.0))
    cluster.submit(make_request("r", max_tokens=9))
    cluster.token("both-0", 0)
    cluster.now_s += 5.0
    cluster.lose("both-0")
    cluster.tick(59.0)
    assert not cluster.ends["r"]
    cluster.tick(2.0)
    assert [end.finish_reason for end in cluster.ends["r"]] == [FinishReason.ERROR]


def test_the_wait_is_over_when_a_worker_has_become_ready() -> None:
    cluster = Cluster(config=RouterConfig(max_wait_for_worker_s=60.0))
    cluster.handle(WorkersExpected(1))
    cluster.submit(make_request("r"))
    cluster.submit(make_request("s"))
    cluster.now_s += 50.0
    cluster.add(worker_info("both-0", max_batch_size=1))
    cluster.tick(100.0)
    assert not cluster.ends["r"] and not cluster.ends["s"]
    cluster.output("both-0", TransferId("r", 0), 0, FinishReason.STOP)
    cluster.leg_ended("both-0", Leg.DECODE, transfer=TransferId("r", 0))
    assert cluster.spec("both-0").transfer.request_id == "s"
