"""A running cluster's telemetry of the requests that it served: counted, traced and explained."""

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, cast

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2 as collector_pb,
    trace_service_pb2_grpc as collector_rpc,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from pdserve.proto import pdserve_pb2 as pb

from ..telemetry.support import nonzero
from .harness import Cluster, Clusters, tokens_of

pytestmark = pytest.mark.cluster
PROMPT = (
    "A context manager is an object that defines the runtime context to be established when executing a with"
    " statement."
)
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class TraceReceiver(collector_rpc.TraceServiceServicer):
    """A collector that accepts traces until it is stopped."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(1))
        cast(Any, collector_rpc).add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(
        self, request: collector_pb.ExportTraceServiceRequest, context: object
    ) -> collector_pb.ExportTraceServiceResponse:
        self.spans += [
            span for of in request.resource_spans for scope in of.scope_spans for span in scope.spans
        ]
        return collector_pb.ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture(scope="module")
def collector() -> Iterator[TraceReceiver]:
    collector = TraceReceiver()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def cluster(collector: TraceReceiver, clusters: Clusters) -> Cluster:
    """It has served nobody else."""
    return clusters.get(observability={"otlp_endpoint": f"http://127.0.0.1:{collector.port}"})


def until(cluster: Cluster, is_so: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Returns the metrics once the condition holds; checks them with every state that the cluster sends."""
    for _ in cluster.admin.WatchStatus(pb.WatchStatusRequest(), timeout=240):
        values = nonzero(cluster._launched.metrics())
        if is_so(values):
            return values
    raise AssertionError("the status stream ended")


def large_request(cluster: Cluster) -> pb.GenerateRequest:
    """A request whose stream is larger than what is buffered on its way: it runs until it is read."""
    return cluster.request(PROMPT, max_tokens=1500, logprobs=20)


def num_closed(values: dict[str, float]) -> float:
    return sum(value for name, value in values.items() if name.startswith("request_success_total"))


def num_cancelled(values: dict[str, float]) -> float:
    return values.get('request_success_total{finished_reason="cancelled"}', 0.0)


def test_after_some_requests_the_counters_equal_what_was_done(cluster: Cluster) -> None:
    requests = [
        cluster.request(PROMPT, max_tokens=10 + number, salt=str(number), n=1 + number % 2)
        for number in range(8)
    ]
    answers = cluster.generate_all(requests)
    cached = [cluster.request(PROMPT, max_tokens=12, salt="0") for _ in range(4)]
    answers += cluster.generate_all(cached)
    requests += cached
    call: Any = cluster.generation.GenerateStream(large_request(cluster))
    next(call)
    call.cancel()
    values = until(cluster, lambda values: num_closed(values) == 13)

    usages = [events[-1].end.usage for events in answers]
    num_choices = sum(request.sampling.n or 1 for request in requests)
    num_tokens = sum(usage.completion_tokens for usage in usages)
    assert values['request_success_total{finished_reason="length"}'] == len(requests)
    assert num_cancelled(values) == 1
    assert values["request_generation_tokens_sum"] == num_tokens
    assert values["generation_tokens_total"] > num_tokens, "what the cancelled client got counts too"
    assert values["request_prompt_tokens_sum"] == sum(usage.prompt_tokens for usage in usages)
    assert values["prompt_tokens_total"] == 13 * usages[0].prompt_tokens
    assert values['prefix_cache_queries_total{pool="prefill"}'] == values["prompt_tokens_total"]
    assert (
        values['prefix_cache_hits_total{pool="prefill"}'] >= sum(usage.cached_tokens for usage in usages) > 0
    )
    assert values["inter_token_latency_seconds_count"] == values["generation_tokens_total"] - num_choices - 1
    for name in (
        "e2e_request_latency_seconds",
        "request_decode_time_seconds",
        "request_time_per_output_token_seconds",
    ):
        assert values[f"{name}_count"] == len(requests)
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds"):
        assert values[f"{name}_count"] == len(requests) + 1
    assert values['request_prefill_time_seconds_count{pool="prefill"}'] == len(requests) + 1
    assert sum(value for name, value in values.items() if name.startswith("slo_requests_total")) == len(
        requests
    )
    assert values["requests_admitted_total"] == values["dispatches_total"] == len(requests) + 1
    assert values["kv_transfer_bytes_count"] >= len(requests)
    assert values["kv_transfer_bytes_sum"] > 0
    assert 'step_duration_seconds_count{phase="prefill",pool="prefill"}' in values
    assert 'step_duration_seconds_count{phase="decode",pool="decode"}' in values
    assert values['estimated_flops_total{phase="decode",pool="decode"}'] > 0
    assert values['workers_ready{pool="prefill"}'] == values['workers_ready{pool="decode"}'] == 1
    assert "dispatches_retried_total" not in values
    assert "router_takeovers_total" not in values


def test_the_parts_of_ttft_add_up_and_the_control_plane_is_smallest(cluster: Cluster) -> None:
    before = nonzero(cluster._launched.metrics())
    cluster.stream(cluster.request(PROMPT, max_tokens=4, salt="parts"))
    after = until(cluster, lambda values: num_closed(values) == num_closed(before) + 1)

    def spent(name: str) -> float:
        """Returns the sum over all pools."""
        sums = [
            {k: v for k, v in values.items() if k.startswith(f"{name}_seconds_sum")}
            for values in (after, before)
        ]
        return sum(sums[0].values()) - sum(sums[1].values())

    parts = [spent(f"request_{part}_time") for part in ("queue", "worker_queue", "prefill", "overhead")]
    assert spent("time_to_first_token") == pytest.approx(sum(parts), rel=0.01)


def test_a_request_is_one_trace_below_its_client(cluster: Cluster, collector: TraceReceiver) -> None:
    request = cluster.request(PROMPT, max_tokens=5)
    request.request_id = "traced"
    headers = (("traceparent", f"00-{TRACE}-{SPAN}-01"),)
    assert len(tokens_of(cluster.generation.GenerateStream(request, metadata=headers, timeout=60))) == 5

    def spans() -> dict[str, Span]:
        return {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}

    until(cluster, lambda values: len(spans()) == 5)
    legs = spans()
    root = legs.pop("request")
    assert root.parent_span_id.hex() == SPAN
    assert set(legs) == {"queue", "prefill", "transfer", "decode"}
    for span in legs.values():
        assert span.parent_span_id == root.span_id
        assert span.start_time_unix_nano <= span.end_time_unix_nano
    explained = cluster.admin.Explain(pb.ExplainRequest(request_id="traced"))
    assert explained.trace_id == TRACE


def test_explain_shows_every_leg_of_a_finished_request(cluster: Cluster) -> None:
    request = cluster.request(PROMPT, max_tokens=20, salt="explained")
    request.request_id = "explained"
    cluster.stream(request)
    cluster.check_all_blocks_free()
    until(
        cluster,
        lambda values: cluster.admin.Explain(pb.ExplainRequest(request_id="explained")).outcome == "length",
    )
    explained = cluster.admin.Explain(pb.ExplainRequest(request_id="explained"))
    (attempt,) = explained.attempts
    legs = {leg.leg: leg for leg in attempt.legs}
    assert list(legs) == ["queue", "worker queue", "prefill", "first token", "transfer", "token gap"]
    assert all(leg.HasField("actual_s") for leg in legs.values())
    assert [name for name, leg in legs.items() if not leg.HasField("predicted_s")] == ["queue"]
    assert explained.completion_tokens == 20
    assert attempt.considered[0].prefill_worker == attempt.prefill_worker == "worker-1"


def test_explain_shows_a_running_request(cluster: Cluster) -> None:
    before = num_cancelled(nonzero(cluster._launched.metrics()))
    request = large_request(cluster)
    request.request_id = "running"
    call: Any = cluster.generation.GenerateStream(request)
    next(call)
    assert cluster.admin.Explain(pb.ExplainRequest(request_id="running")).outcome == "running"
    call.cancel()
    # until then, workers may not even have reported that it began
    until(cluster, lambda values: num_cancelled(values) == before + 1)
    cluster.check_all_blocks_free()


def test_a_collectors_death_disturbs_no_request(cluster: Cluster, collector: TraceReceiver) -> None:
    before = num_closed(nonzero(cluster._launched.metrics()))
    collector.stop()
    answers = cluster.generate_all(
        [cluster.request(PROMPT, max_tokens=8, salt=f"late/{number}") for number in range(16)]
    )
    assert [len(tokens_of(events)) for events in answers] == [8] * 16
    until(cluster, lambda values: num_closed(values) == before + 16)
