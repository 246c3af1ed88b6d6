"""The head dies: workers continue, a new head takes over, and clients that come back get the rest of the same
stream."""

import os
import signal
from collections.abc import Iterable, Iterator

import grpc
import pytest

from pdserve.cli.client import connect
from pdserve.cli.coming_back import resuming_stream
from pdserve.proto import pdserve_pb2 as pb

from ..telemetry.support import nonzero
from .harness import Cluster, Clusters, process_of, text_of, tokens_of

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(clusters: Clusters) -> Iterator[Cluster]:
    cluster = clusters.get()
    yield cluster
    cluster.check_all_blocks_free()


def num_takeovers(cluster: Cluster) -> float:
    return nonzero(cluster._launched.metrics()).get("router_takeovers_total", 0.0)


def read_until_lost(call: Iterable[pb.GenerateEvent], events: list[pb.GenerateEvent]) -> None:
    with pytest.raises(grpc.RpcError) as lost:
        events.extend(call)  # keeps events before the error
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE


def come_back(cluster: Cluster, request: pb.GenerateRequest) -> list[pb.GenerateEvent]:
    """Retries like a client while no server answers."""
    while True:
        events: list[pb.GenerateEvent] = []
        try:
            events.extend(cluster.generation.GenerateStream(request, wait_for_ready=True, timeout=240))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or events:
                raise
            continue
        return events


def test_a_client_that_reconnects_after_a_head_death_gets_the_rest(cluster: Cluster) -> None:
    request = cluster.request("A generator is a function", max_tokens=900, n=2, temperature=0.8, seed=5)
    request.request_id = "undisturbed"
    expected = cluster.stream(request)
    before, takeovers_before = cluster.pids(), num_takeovers(cluster)
    request.request_id = "mine"
    call = cluster.generation.GenerateStream(request, timeout=120)
    events = [next(iter(call)) for _ in range(20)]
    os.kill(process_of("HeadActor"), signal.SIGKILL)
    read_until_lost(call, events)
    counts = [
        sum(len(event.tokens.token_ids) for event in events if event.tokens.choice == choice)
        for choice in range(2)
    ]
    request.resume_from[:] = counts
    rest = come_back(cluster, request)
    for choice in range(2):
        assert tokens_of(events + rest, choice) == tokens_of(expected, choice)
    assert len(rest[-1].end.timeline.attempts) == 1
    assert cluster.pids() == before
    assert num_takeovers(cluster) == takeovers_before + 1


def test_the_command_line_s_stream_survives_the_death_of_the_head(cluster: Cluster) -> None:
    request = cluster.request("A generator is a function", max_tokens=900, n=2, temperature=0.8, seed=5)
    expected = cluster.stream(request)
    with connect(cluster.address) as client:
        stream = resuming_stream(client, request, timeout=120)
        events = [next(stream) for _ in range(20)]
        os.kill(process_of("HeadActor"), signal.SIGKILL)
        events += stream
    for choice in range(2):
        assert tokens_of(events, choice) == tokens_of(expected, choice)
        assert text_of(events, choice) == text_of(expected, choice)
