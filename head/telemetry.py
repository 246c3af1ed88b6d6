"""The head's telemetry: assembles the parts of `telemetry` for one cluster."""

import asyncio
from collections.abc import Callable

from ..core.config import ClusterConfig
from ..core.latency import LatencyModel
from ..router.events import Timeline
from ..telemetry.exposition import Exposition, Snapshot
from ..telemetry.recent import RecentRequests
from ..telemetry.recorder import TelemetryRecorder, Traces
from ..telemetry.request_log import RequestLog
from ..telemetry.steps import StepCosts, StepTally
from ..telemetry.tally import Tally


class HeadTelemetry:
    """Metrics, recent requests, and traces when there is an endpoint for them."""

    def __init__(
        self,
        config: ClusterConfig,
        costs: StepCosts,
        model: LatencyModel,
        otlp_endpoint: str | None,
        snapshot: Callable[[int], Snapshot],
    ) -> None:
        """`snapshot` returns the current state, given the number of spans that were made."""
        slo = config.slo
        steps = StepTally()
        self._tally = Tally(steps, ttft_slo_s=slo.ttft_ms / 1e3, itl_slo_s=slo.itl_ms / 1e3)
        self._recent = RecentRequests()
        self._traces = None if otlp_endpoint is None else _exporter(otlp_endpoint, config.model.name)
        self._exposition = Exposition(self._tally, steps, costs, model, lambda: snapshot(self._num_spans))
        clock = asyncio.get_running_loop().time
        requests = RequestLog(config.observability.request_lines_per_s, clock)
        self.recorder = TelemetryRecorder(self._tally, steps, self._recent, self._traces, requests, clock)

    def configure(self, config: ClusterConfig) -> None:
        """Applies the SLO of a new configuration."""
        self._tally.ttft_slo_s, self._tally.itl_slo_s = config.slo.ttft_ms / 1e3, config.slo.itl_ms / 1e3

    def metrics(self) -> bytes:
        return self._exposition.render()

    def recent(self, request_id: str) -> Timeline | None:
        return self._recent.get(request_id)

    def latest(self, max_requests: int, scope: str) -> list[Timeline]:
        return self._recent.latest(max_requests, scope)

    @property
    def _num_spans(self) -> int:
        return 0 if self._traces is None else self._traces.num_spans

    async def close(self) -> None:
        """Sends pending spans, if that is quick."""
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)


def _exporter(endpoint: str, model: str) -> Traces:
    from ..telemetry.otlp import TraceExporter  # a second of imports that most clusters do not need

    return TraceExporter(endpoint, model)
