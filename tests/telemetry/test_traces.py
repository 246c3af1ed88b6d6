"""One trace per request, below its client's span; an absent collector affects nothing."""

import socket
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any, cast

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2 as collector_pb,
    trace_service_pb2_grpc as collector_rpc,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pdserve.core.messages import Leg
from pdserve.core.request import FinishReason
from pdserve.router.config import RouterConfig
from pdserve.router.events import Timeline
from pdserve.telemetry import otlp
from pdserve.telemetry.otlp import TraceExporter
from pdserve.telemetry.spans import leg_spans, request_span

from ..router.cluster import make_request
from .support import STATS, Watched

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def served(traceparent: str = "", *, is_lost: bool = False) -> Timeline:
    """The timeline of a request of three tokens; with `is_lost`, its decode worker dies after the second."""
    cluster = Watched("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))
    cluster.now_s = 100.0
    request = make_request(max_tokens=3)
    cluster.submit(
        type(request)(
            **{name: getattr(request, name) for name in request.__struct_fields__}
            | {"traceparent": traceparent}
        )
    )
    cluster.now_s = 100.04
    cluster.token("prefill-0", 0)
    cluster.now_s = 100.05
    cluster.token("decode-0", 1)
    cluster.end_leg("prefill-0", Leg.PREFILL, num_cached_tokens=16, queue_s=0.01, compute_s=0.03, stats=STATS)
    cluster.now_s = 100.06
    if is_lost:
        cluster.lose("decode-0")
        cluster.now_s = 100.08
        cluster.token("prefill-0", 2, FinishReason.LENGTH)
        cluster.end_leg("prefill-0", Leg.PREFILL, queue_s=0.0, compute_s=0.02)
    else:
        cluster.token("decode-0", 2, FinishReason.LENGTH)
        cluster.end_leg("decode-0", Leg.DECODE, queue_s=0.045)
    (timeline,) = cluster.timelines
    return timeline


@pytest.fixture
def exported() -> Iterator[tuple[TraceExporter, InMemorySpanExporter]]:
    memory = InMemorySpanExporter()
    exporter = TraceExporter("", "tiny", memory)
    yield exporter, memory
    exporter.close()


def export(
    exported: tuple[TraceExporter, InMemorySpanExporter], timeline: Timeline
) -> dict[str, ReadableSpan]:
    exporter, memory = exported
    exporter.export(timeline, timeline.ended_s)
    exporter.close()
    return {span.name: span for span in memory.get_finished_spans()}


def test_each_leg_is_a_span_with_worker_tokens_and_time() -> None:
    spans = {span.name: span for span in leg_spans(served())}
    times = {name: (span.start_s - 100.0, span.end_s - 100.0) for name, span in spans.items()}
    assert times == {
        "queue": pytest.approx((0.0, 0.0)),
        "prefill": pytest.approx((0.01, 0.04)),
        "transfer": pytest.approx((0.024, 0.044)),
        "decode": pytest.approx((0.04, 0.06)),
    }
    assert spans["prefill"].attributes["pdserve.worker"] == "prefill-0"
    assert spans["prefill"].attributes["pdserve.num_cached_tokens"] == 16
    assert spans["transfer"].attributes["pdserve.num_bytes"] == STATS.num_bytes
    assert (
        spans["decode"].attributes["pdserve.worker"],
        spans["decode"].attributes["pdserve.num_tokens"],
    ) == ("decode-0", 3)


def test_a_failed_attempt_has_spans_of_its_own_that_say_why() -> None:
    spans = list(leg_spans(served(is_lost=True)))
    assert [span.attributes["pdserve.attempt"] for span in spans] == [0, 0, 0, 0, 1, 1]
    assert [span.error for span in spans if span.name == "decode"] == ["decode-0: killed"]
    assert request_span(served(is_lost=True)).error is None, "its client noticed nothing"


def test_a_request_that_never_left_the_queue_has_that_leg_only() -> None:
    waiting = Timeline(
        request_id="r",
        submitted_s=1.0,
        first_token_s=None,
        ended_s=3.0,
        dispatches=(),
        finish_reasons=(FinishReason.DEADLINE,),
    )
    assert [(span.name, span.end_s - span.start_s) for span in leg_spans(waiting)] == [("queue", 2.0)]
    assert request_span(waiting).error == "the request ended with deadline"


def test_legs_lie_below_the_request_and_the_request_below_the_client(
    exported: tuple[TraceExporter, InMemorySpanExporter],
) -> None:
    spans = export(exported, served(f"00-{TRACE}-{SPAN}-01"))
    assert set(spans) == {"request", "queue", "prefill", "transfer", "decode"}
    root = spans.pop("request")
    assert root.context is not None
    assert root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, SPAN)
    for span in spans.values():
        assert span.context is not None
        assert span.parent is not None
        assert (span.context.trace_id, span.parent.span_id) == (root.context.trace_id, root.context.span_id)


def test_spans_lie_in_wall_clock_time(exported: tuple[TraceExporter, InMemorySpanExporter]) -> None:
    before_ns = time.time_ns()
    spans = export(exported, served())
    request = spans["request"]
    assert request.start_time is not None
    assert request.end_time is not None
    assert before_ns <= request.end_time <= time.time_ns()
    assert request.end_time - request.start_time == pytest.approx(60e6, abs=1e3)


def test_a_request_without_a_parent_has_a_trace_of_its_own(
    exported: tuple[TraceExporter, InMemorySpanExporter],
) -> None:
    root = export(exported, served())["request"]
    assert root.parent is None
    assert root.attributes is not None
    assert root.attributes["gen_ai.usage.output_tokens"] == 3


def test_an_unsampled_trace_is_not_exported(
    exported: tuple[TraceExporter, InMemorySpanExporter],
) -> None:
    assert export(exported, served(f"00-{TRACE}-{SPAN}-00")) == {}
    assert exported[0].num_spans == 0


class SpanList(collector_rpc.TraceServiceServicer):
    """Keeps what comes."""

    def __init__(self) -> None:
        self.requests: list[collector_pb.ExportTraceServiceRequest] = []

    def Export(
        self, request: collector_pb.ExportTraceServiceRequest, context: object
    ) -> collector_pb.ExportTraceServiceResponse:
        self.requests.append(request)
        return collector_pb.ExportTraceServiceResponse()


def test_spans_reach_a_collector_over_otlp() -> None:
    collector = SpanList()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    cast(Any, collector_rpc).add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    exporter = TraceExporter(f"http://127.0.0.1:{port}", "tiny")
    timeline = served(f"00-{TRACE}-{SPAN}-01")
    exporter.export(timeline, timeline.ended_s)
    exporter.close()
    server.stop(0)
    (resource,) = (spans for request in collector.requests for spans in request.resource_spans)
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["decode", "prefill", "queue", "request", "transfer"]
    assert {span.trace_id.hex() for scope in resource.scope_spans for span in scope.spans} == {TRACE}


def test_an_absent_collector_costs_only_the_oldest_spans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "64")
    monkeypatch.setattr(otlp, "CLOSE_S", 0.05)
    exporter = TraceExporter(f"http://127.0.0.1:{port}", "tiny")
    timeline = served()
    for _ in range(200):
        exporter.export(timeline, timeline.ended_s)
    assert exporter.num_spans == 1000
    exporter.close()  # returns, though nobody took anything


def test_an_exporter_that_fails_is_not_noticed_by_requests() -> None:
    class Broken(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            raise OSError("no way")

    exporter = TraceExporter("", "tiny", Broken())
    timeline = served()
    exporter.export(timeline, timeline.ended_s)
    exporter.close()
