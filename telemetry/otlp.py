"""Traces to an OpenTelemetry collector over gRPC, made after the fact from timelines: requests are not slowed
by them.

Spans wait in a bounded queue and leave on a thread of their own; when the collector is gone, the oldest are
dropped."""

import os
import threading
import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from ..router.events import Timeline
from .spans import SpanTimes, leg_spans, request_span

CLOSE_S = 2.0  # to get rid of what is left; a collector that does not answer gets no more


class TraceExporter:
    """One trace a request, below the client's span when it sent a `traceparent`; one that is not sampled is
    left out.

    Samplers, limits, headers and certificates are those of OpenTelemetry's environment variables.
    """

    def __init__(self, endpoint: str, model: str, exporter: SpanExporter | None = None) -> None:
        """`exporter` is for tests; by default one to `endpoint`."""
        self.num_spans = 0
        name = os.environ.get("OTEL_SERVICE_NAME", "pdserve")
        resource = Resource.create(
            {"service.name": name, "service.version": __version__, "gen_ai.request.model": model}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("pdserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def export(self, timeline: Timeline, now_s: float) -> None:
        """`now_s` is now on the router's clock: the one place where its instants become wall-clock time."""
        wall_ns = time.time_ns() - round(now_s * 1e9)
        parent = (
            self._propagator.extract({"traceparent": timeline.traceparent}, Context())
            if timeline.traceparent
            else Context()
        )
        request = request_span(timeline)
        root = self._start(request, parent, wall_ns, SpanKind.SERVER)
        if root.is_recording():
            below = set_span_in_context(root, Context())
            for leg in leg_spans(timeline):
                self._end(self._start(leg, below, wall_ns, SpanKind.INTERNAL), leg, wall_ns)
            self._end(root, request, wall_ns)

    def close(self) -> None:
        """Send what is left, for a while; blocks meanwhile."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        thread.start()
        thread.join(CLOSE_S)

    def _start(self, span: SpanTimes, parent: Context, wall_ns: int, kind: SpanKind) -> Span:
        start_ns = wall_ns + round(span.start_s * 1e9)
        started = self._tracer.start_span(span.name, parent, kind, span.attributes, start_time=start_ns)
        return started  # type: ignore[return-value]  # the SDK's tracer makes the SDK's spans

    def _end(self, started: Span, span: SpanTimes, wall_ns: int) -> None:
        if span.error is not None:
            started.set_status(Status(StatusCode.ERROR, span.error))
        started.end(wall_ns + round(span.end_s * 1e9))
        self.num_spans += 1
