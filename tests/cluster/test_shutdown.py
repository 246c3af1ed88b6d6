"""The end of a cluster: streams finish first, then nothing is left of it; also when what holds it together dies."""

import os
import select
import signal

import pytest

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


def test_the_death_of_the_keeper_is_told_and_takes_head_and_workers_with_it() -> None:
    cluster = Cluster("embedded")
    try:
        (keeper,) = (pid for pid, command in session_processes().items() if "KeeperActor" in command)
        (head,) = (pid for pid, command in session_processes().items() if "HeadActor" in command)
        processes = [os.pidfd_open(pid) for pid in (keeper, head, *_worker_pids(cluster))]
        os.kill(keeper, signal.SIGKILL)
        for process in processes:
            ended, _, _ = select.select([process], [], [], 60.0)  # readable when the process has ended
            os.close(process)
            assert ended
        assert cluster._launched._over.wait(60.0)
        assert "died" in str(cluster._launched.poll())
    finally:
        cluster.channel.close()
        cluster._launched.stop()


def _worker_pids(cluster: Cluster) -> list[int]:
    return [worker.pid for worker in cluster.admin.GetStatus(pb.GetStatusRequest()).workers]
