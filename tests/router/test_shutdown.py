"""Streams and waiting requests when workers drain, or the cluster shuts down."""

import pytest

from pdserve.core.errors import NoWorkerAvailable
from pdserve.core.messages import Leg
from pdserve.core.request import FinishReason
from pdserve.router.events import (
    Closing,
    WorkerDraining,
    WorkerIdle,
)

from .cluster import Cluster, make_request
from .overloaded import PAIRS_ONLY, one_at_a_time


def test_shutdown_refuses_new_and_waiting_requests_and_finishes_running_ones() -> None:
    cluster = one_at_a_time()
    cluster.submit(make_request("waiting"))
    cluster.handle(Closing())
    with pytest.raises(NoWorkerAvailable, match="shutting down"):
        cluster.submit(make_request("new"))
    cluster.handle(WorkerDraining("both-0"))
    (end,) = cluster.ends["waiting"]
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, "the cluster is shutting down")
    cluster.token("both-0", 0, FinishReason.LENGTH)
    assert WorkerIdle("both-0", 1) in cluster.leg_ended("both-0", Leg.PREFILL)
    assert cluster.choice_ends["running", 0] == [FinishReason.LENGTH]


def test_a_draining_prefill_worker_is_not_idle_before_its_kv_is_sent() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request("a"))
    cluster.handle(WorkerDraining("prefill-0"))
    assert WorkerIdle("prefill-0", 1) not in cluster.token("prefill-0", 0)
    assert WorkerIdle("prefill-0", 1) in cluster.leg_ended("prefill-0", Leg.PREFILL)


def test_streams_of_a_worker_stopped_after_the_drain_timeout_continue_elsewhere() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1", config=PAIRS_ONLY)
    cluster.submit(make_request("a"))
    cluster.token("prefill-0", 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL)
    cluster.token("decode-0", 1)
    cluster.handle(WorkerDraining("decode-0"))
    cluster.lose("decode-0")
    assert cluster.spec("decode-1").output_token_ids == (100, 101)
    cluster.token("prefill-0", 2)
    assert cluster.tokens["a", 0] == [0, 1, 2]


def test_streams_that_outlast_a_cluster_end_as_unavailable() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(make_request("a"))
    cluster.handle(Closing())
    for worker_id in ("both-0", "both-1"):
        cluster.handle(WorkerDraining(worker_id))
    for worker_id in ("both-0", "both-1"):
        cluster.lose(worker_id)
    (end,) = cluster.ends["a"]
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, "the cluster is shutting down")
