"""The end of a cluster: streams finish first, then nothing is left of it; also when its head dies."""

import os
import select
import signal

import pytest
import ray

from pdserve.proto import pdserve_pb2 as pb

from .harness import Cluster, session_processes, tokens_of

pytestmark = pytest.mark.cluster


def test_shutting_down_lets_streams_finish_and_ends_every_worker() -> None:
    cluster = Cluster("embedded")
    try:
        stream = cluster.generation.GenerateStream(cluster.request("import this", max_tokens=200))
        events = [next(stream)]
        progress = cluster.admin.Drain(pb.DrainRequest(shutdown=True))
        events += list(stream)
        assert len(tokens_of(events)) == 200
        assert list(progress)[-1].done
    finally:
        cluster.channel.close()
        cluster._launched.stop()


def test_the_death_of_the_head_is_told_and_takes_the_workers_with_it() -> None:
    cluster = Cluster("embedded")
    try:
        (head,) = (pid for pid, command in session_processes().items() if "HeadActor" in command)
        processes = [os.pidfd_open(pid) for pid in (head, *_worker_pids(cluster))]
        os.kill(head, signal.SIGKILL)
        for process in processes:
            ended, _, _ = select.select([process], [], [], 60.0)  # readable when the process has ended
            os.close(process)
            assert ended
        ray.wait([cluster._launched._ended], timeout=60.0)
        assert "died" in str(cluster._launched.poll())
    finally:
        cluster.channel.close()
        cluster._launched.stop()


def _worker_pids(cluster: Cluster) -> list[int]:
    return [worker.pid for worker in cluster.admin.GetStatus(pb.GetStatusRequest()).workers]
