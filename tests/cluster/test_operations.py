"""Operators' actions under traffic, and clients' actions: nothing fails, and no resource is left behind."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pdserve.cluster.errors import LaunchError
from pdserve.cluster.launch import launch
from pdserve.core.config import ClusterConfig
from pdserve.core.errors import CapacityError, CheckpointError, ConfigError
from pdserve.planner.plan import plan
from pdserve.proto import pdserve_pb2 as pb

from .harness import Cluster, Clusters, tokens_of, workers_of

pytestmark = pytest.mark.cluster
PROMPT = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager."
)


@pytest.fixture
def cluster(clusters: Clusters) -> Iterator[Cluster]:
    """Every test must leave all blocks free."""
    cluster = clusters.get()
    yield cluster
    cluster.check_all_blocks_free()


def test_text_streams_from_two_workers_with_a_timeline(cluster: Cluster) -> None:
    events = cluster.stream(cluster.request(PROMPT, max_tokens=30))
    assert len(tokens_of(events)) == 30
    assert "".join(event.tokens.text for event in events if event.HasField("tokens"))
    (prefill,), (decode,) = cluster.workers("prefill"), cluster.workers("decode")
    assert workers_of(events) == (prefill.worker_id, decode.worker_id)
    transfer = events[-1].end.timeline.attempts[0].transfer
    assert transfer.num_bytes > 0
    assert transfer.num_chunks > 0
    assert events[-1].end.usage.completion_tokens == 30


def test_unary_and_streamed_answers_are_the_same(cluster: Cluster) -> None:
    request = cluster.request(PROMPT, max_tokens=20)
    response = cluster.generation.Generate(request, timeout=60)
    events = cluster.stream(request)
    assert list(response.choices[0].token_ids) == tokens_of(events)
    assert response.choices[0].text == "".join(e.tokens.text for e in events if e.HasField("tokens"))


def test_a_request_of_one_token_needs_no_transfer(cluster: Cluster) -> None:
    events = cluster.stream(cluster.request(PROMPT, max_tokens=1))
    assert len(tokens_of(events)) == 1
    assert events[-1].end.timeline.attempts[0].transfer.num_bytes == 0


def test_a_second_request_finds_its_prompt_cached(cluster: Cluster) -> None:
    prompt = list(range(100, 400))
    first = cluster.stream(cluster.request(prompt, salt="cached"))
    second = cluster.stream(cluster.request(prompt, salt="cached"))
    assert tokens_of(first) == tokens_of(second)
    assert second[-1].end.usage.cached_tokens >= 256 > first[-1].end.usage.cached_tokens


def test_a_cancelled_stream_frees_everything_on_both_workers(cluster: Cluster) -> None:
    for number_read in (0, 1, 5):
        call: Any = cluster.generation.GenerateStream(cluster.request(PROMPT, max_tokens=1500))
        for _ in range(number_read):
            next(call)
        call.cancel()
    cluster.check_all_blocks_free()


def test_a_deadline_ends_the_stream_and_frees_everything(cluster: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(cluster.generation.GenerateStream(cluster.request(PROMPT, max_tokens=1900), timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.check_all_blocks_free()


@pytest.mark.parametrize(
    ("field", "request_of"),
    [
        ("prompt", lambda c: c.request([])),
        ("prompt", lambda c: c.request([5] * 3000)),
        ("sampling.temperature", lambda c: c.request(PROMPT, temperature=-0.5)),
        ("sampling.max_tokens", lambda c: c.request(PROMPT, max_tokens=10_000)),
        ("sampling.top_p", lambda c: c.request(PROMPT, top_p=1.5)),
        ("sampling.n", lambda c: c.request(PROMPT, n=1000)),
    ],
)
def test_invalid_input_is_named_and_disturbs_no_other_request(
    cluster: Cluster, field: str, request_of: Callable[[Cluster], pb.GenerateRequest]
) -> None:
    good = cluster.generation.GenerateStream(cluster.request(PROMPT, max_tokens=40))
    next(iter(good))
    with pytest.raises(grpc.RpcError) as caught:
        cluster.stream(request_of(cluster))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(cast(grpc.Call, caught.value))
    assert status is not None
    violation = error_details_pb2.BadRequest()
    assert any(detail.Unpack(violation) for detail in status.details)
    assert violation.field_violations[0].field.split(".")[-1].startswith(field.split(".")[-1])
    assert list(good)[-1].WhichOneof("event") == "end"


def test_a_wrong_model_name_is_not_found(cluster: Cluster) -> None:
    request = cluster.request(PROMPT)
    request.model = "gpt-17"
    with pytest.raises(grpc.RpcError) as caught:
        cluster.stream(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "gpt-17" in str(caught.value.details())


def test_a_changed_model_is_not_applied_to_a_running_cluster(cluster: Cluster) -> None:
    model = cluster.settings["model"]
    cluster.settings["model"] = {"path": "/elsewhere"}
    try:
        with pytest.raises(grpc.RpcError) as caught:
            cluster.apply()
    finally:
        cluster.settings["model"] = model
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "model.path" in str(caught.value.details())


def test_more_instances_than_cores_are_refused_and_nothing_changes(cluster: Cluster) -> None:
    try:
        with pytest.raises(grpc.RpcError) as caught:
            cluster.apply(prefill=500)
    finally:
        cluster.settings["pools"]["prefill"]["instances"] = 1
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    cluster.wait_for(prefill=1, decode=1)


def test_no_request_fails_while_workers_are_added_drained_and_removed(cluster: Cluster) -> None:
    expected = tokens_of(cluster.stream(cluster.request(PROMPT, max_tokens=60)))
    stop = threading.Event()

    def client(number: int) -> int:
        served = 0
        while not stop.is_set():
            events = cluster.stream(cluster.request(PROMPT, salt=f"{number}/{served}", max_tokens=60))
            assert tokens_of(events) == expected
            served += 1
        return served

    with ThreadPoolExecutor(max_workers=6) as pool:
        clients = [pool.submit(client, number) for number in range(6)]
        try:
            for prefill, decode in ((2, 1), (2, 2), (1, 2), (1, 1)):
                cluster.resize(prefill=prefill, decode=decode)
        finally:
            stop.set()
        assert all(future.result() > 0 for future in clients)


def test_a_drained_worker_finishes_its_streams_and_the_other_pool_stands_in(cluster: Cluster) -> None:
    (decoder,) = (worker.worker_id for worker in cluster.workers("decode"))
    long = cluster.generation.GenerateStream(cluster.request(PROMPT, max_tokens=400))
    events = [next(iter(long))]
    drain = cluster.admin.Drain(pb.DrainRequest(worker_ids=[decoder]))
    events += list(long)
    assert len(tokens_of(events)) == 400
    assert list(drain)[-1].done
    assert "decode" in cluster.status().degraded
    prefill, decode = workers_of(cluster.stream(cluster.request(PROMPT)))
    assert prefill == decode
    cluster.resize(prefill=1, decode=1)


def test_a_second_cluster_in_the_same_ray_is_refused(cluster: Cluster) -> None:
    with pytest.raises(LaunchError, match="already"):
        launch(ClusterConfig.model_validate({"listen": {"grpc": "127.0.0.1:0", "http": None}}))


def test_a_port_in_use_is_refused_before_anything_starts(cluster: Cluster) -> None:
    address = cluster._launched.grpc_address
    with pytest.raises(ConfigError, match=address):
        launch(ClusterConfig.model_validate({"listen": {"grpc": address}}))


def test_an_infeasible_configuration_is_refused_before_anything_starts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CapacityError, match="cores"):
        plan(ClusterConfig.model_validate({"pools": {"prefill": {"instances": 400}}})).check()
    with pytest.raises(CheckpointError, match="nowhere"):
        plan(ClusterConfig.model_validate({"model": {"path": str(tmp_path / "nowhere")}}))
