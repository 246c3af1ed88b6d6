"""The head dies: workers continue, a new head takes over, and clients that come back get the rest of the same
stream."""

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import pytest

from pdserve.cli.client import connect
from pdserve.cli.coming_back import resuming_stream
from pdserve.engine.checkpoint import resolve_model_path
from pdserve.proto import pdserve_pb2 as pb

from ..telemetry.support import nonzero
from .harness import Cluster, session_processes, text_of, tokens_of

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster("embedded", prefill=1, decode=1)
    yield cluster
    cluster.close()


def kill_head() -> None:
    (head,) = (pid for pid, command in session_processes().items() if "HeadActor" in command)
    os.kill(head, signal.SIGKILL)


def pids(cluster: Cluster) -> dict[str, int]:
    status = cluster.admin.GetStatus(pb.GetStatusRequest(), wait_for_ready=True, timeout=240)
    return {worker.worker_id: worker.pid for worker in status.workers}


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
    request = cluster.request("A generator is a function", max_tokens=1500, n=2, temperature=0.8, seed=5)
    request.request_id = "undisturbed"
    expected = cluster.stream(request)
    before = pids(cluster)
    request.request_id = "mine"
    call = cluster.generation.GenerateStream(request, timeout=120)
    events = [next(iter(call)) for _ in range(20)]
    kill_head()
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
    assert pids(cluster) == before
    assert nonzero(cluster._launched.metrics())["router_takeovers_total"] == 1


def test_the_command_line_s_stream_survives_the_death_of_the_head(cluster: Cluster) -> None:
    request = cluster.request("A generator is a function", max_tokens=1500, n=2, temperature=0.8, seed=5)
    expected = cluster.stream(request)
    with connect(cluster.address) as client:
        stream = resuming_stream(client, request, timeout=120)
        events = [next(stream) for _ in range(20)]
        kill_head()
        events += stream
    for choice in range(2):
        assert tokens_of(events, choice) == tokens_of(expected, choice)
        assert text_of(events, choice) == text_of(expected, choice)


def test_a_head_that_cannot_start_tries_again_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(resolve_model_path("embedded"), model)
    has_failed = threading.Event()
    said: list[str] = []

    def error(text: str, *values: object) -> None:
        said.append(text % values)
        if away.exists():
            away.rename(model)
        has_failed.set()

    monkeypatch.setattr(logging.getLogger("pdserve.cluster.launch"), "error", error)
    cluster = Cluster(model)
    try:
        before = pids(cluster)
        model.rename(away)
        kill_head()
        assert has_failed.wait(60.0)
        assert pids(cluster) == before, "workers went on"
        assert str(model) in said[0]
    finally:
        cluster.close()
