"""The end of a cluster: streams finish first, then nothing is left of it."""

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
