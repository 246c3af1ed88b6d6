"""The status shows a worker that has sequences to compute and ends no step, even if it sends heartbeats."""

import pytest

from pdserve.core.messages import StepReport, StepTiming, WorkerLoad

from .cluster import Cluster

TIMING = StepTiming(
    num_prefill_tokens=0, sum_prefill_squares=0, num_decode_sequences=1, num_context_tokens=9, duration_s=0.01
)


def report(cluster: Cluster, num_running: int, timing: StepTiming | None = None) -> None:
    load = WorkerLoad(num_running=num_running, num_free_blocks=10)
    cluster.handle(StepReport(worker_id="decode-0", incarnation=1, load=load, timing=timing))


def stalled_s(cluster: Cluster) -> float:
    return cluster.router.status(cluster.now_s).workers[0].stalled_s


@pytest.mark.parametrize("num_running", [0, 3])
def test_a_stall_counts_from_the_last_step_of_a_worker_with_work(num_running: int) -> None:
    cluster = Cluster("decode-0")
    report(cluster, num_running, TIMING)
    for _ in range(10):
        cluster.now_s += 0.5
        report(cluster, num_running)
    assert stalled_s(cluster) == (5.0 if num_running else 0.0)
    report(cluster, num_running, TIMING)
    assert stalled_s(cluster) == 0.0


def test_a_worker_that_was_idle_is_not_stalled_when_work_comes() -> None:
    cluster = Cluster("decode-0")
    cluster.now_s = 100.0
    report(cluster, 0)
    cluster.now_s = 100.5
    report(cluster, 1)
    assert stalled_s(cluster) == 0.5
