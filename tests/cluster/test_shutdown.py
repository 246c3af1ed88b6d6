"""The end of a cluster: streams finish first, then nothing is left of it; also when its head dies."""

import os
import signal
import time
from pathlib import Path

import pytest

from pdserve.proto import pdserve_pb2 as pb

from .harness import Cluster, tokens_of

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
        head = next(p for p in Path("/proc").glob("[0-9]*/cmdline") if b"HeadActor" in _read(p)).parent.name
        workers = [Path(f"/proc/{w.pid}") for w in cluster.admin.GetStatus(pb.GetStatusRequest()).workers]
        os.kill(int(head), signal.SIGKILL)
        while cluster._launched.poll() is None or any(process.exists() for process in workers):
            time.sleep(0.05)
        assert "died" in str(cluster._launched.poll())
    finally:
        cluster.channel.close()
        cluster._launched.stop()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended
        return b""
