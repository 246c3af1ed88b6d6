"""Metrics as a scrape reads them: the tally, the router's own counts, and the current state."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric as Family,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..core.histogram import Histogram, merged
from ..core.hosts import HostState
from ..core.latency import LatencyModel
from ..core.messages import Role
from ..core.request import FinishReason
from ..router.planner_desk import PlannerState
from ..router.registered_worker import RoutingState
from ..router.status import RoutedWorkerStatus, RouterStatus
from .catalogue import COUNTERS, GAUGES, GPU_COUNTERS, GPU_GAUGES, HISTOGRAMS, Metric
from .steps import PHASES, StepCosts, StepTally
from .tally import MET, MISSED, Labels, Tally

POOLS = (Role.PREFILL.value, Role.DECODE.value)
# series that are there from the start, so that a rate over the first event is seen
EXPECTED: Mapping[str, tuple[Labels, ...]] = {
    "request_success_total": tuple((reason.value,) for reason in FinishReason),
    "slo_requests_total": tuple((ttft, itl) for ttft in (MET, MISSED) for itl in (MET, MISSED)),
    **{metric.name: tuple((pool,) for pool in POOLS) for metric in COUNTERS if metric.labels == ("pool",)},
    **{
        metric.name: tuple(product(POOLS, PHASES))
        for metric in COUNTERS
        if metric.labels == ("pool", "phase")
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The current state, taken at each scrape."""

    status: RouterStatus
    token_gaps: Histogram
    configured: Mapping[Role, int]
    restarts: Mapping[str, tuple[Role, int]]  # by worker: its pool and how often it was replaced
    hosts: Mapping[HostState, int]
    planner: PlannerState
    num_takeovers: int
    num_spans: int
    stall_s: float  # the longest of the head's loop, lately
    version: str
    model: str


Rows = Iterable[tuple[Labels, float]]


class Exposition(Collector):
    """Renders a registry of its own; `snapshot` is asked at each scrape."""

    def __init__(
        self,
        tally: Tally,
        steps: StepTally,
        costs: StepCosts,
        model: LatencyModel,
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._tally = tally
        self._steps = steps
        self._estimates = {
            "estimated_flops_total": costs.flops,
            "estimated_read_bytes_total": costs.read_bytes,
            "estimated_write_bytes_total": costs.write_bytes,
        }
        self._model = model
        self._snapshot = snapshot
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(namespace="pdserve", registry=self._registry)  # the head's process

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Family]:
        now = self._snapshot()
        gpus = self._steps.gpus.rows((worker.role.value, worker.worker_id) for worker in now.status.workers)
        cpu = {"rank_cpu_seconds": self._steps.cpu_s(now.status.workers)}
        gauges, counters = {**_gauges(now, self._tally), **gpus, **cpu}, _counters(now)
        for metric in (*GAUGES, *GPU_GAUGES):
            yield _family(
                GaugeMetricFamily(metric.full_name, metric.meaning, labels=metric.labels), gauges[metric.name]
            )
        for metric in COUNTERS:
            rows = [((), counters[metric.name])] if metric.name in counters else self._counted(metric)
            yield _family(CounterMetricFamily(metric.full_name, metric.meaning, labels=metric.labels), rows)
        for metric in GPU_COUNTERS:
            yield _family(
                CounterMetricFamily(metric.full_name, metric.meaning, labels=metric.labels), gpus[metric.name]
            )
        for metric in HISTOGRAMS:
            yield self._histogram(metric, now)

    def _counted(self, metric: Metric) -> Rows:
        rows = dict.fromkeys(EXPECTED.get(metric.name, ()), 0.0)
        rows |= {labels: value for (name, labels), value in self._tally.counts.items() if name == metric.name}
        if metric.name == "num_preemptions_total":
            rows |= {(pool,): count for pool, count in self._steps.num_preemptions.items()}
        if (cost := self._estimates.get(metric.name)) is not None:
            rows |= {labels: cost(steps) for labels, steps in self._steps.sums.items()}
        return rows.items()

    def _histogram(self, metric: Metric, now: Snapshot) -> Family:
        family = HistogramMetricFamily(metric.full_name, metric.meaning, labels=metric.labels)
        found = {labels: h for (name, labels), h in self._tally.histograms.items() if name == metric.name}
        if metric.name == "inter_token_latency_seconds":
            found = {(): now.token_gaps}
        elif metric.name == "step_duration_seconds":
            found = {key: steps.durations for key, steps in self._steps.sums.items()}
        elif metric.name == "prediction_ratio":
            found |= {(what,): merged(histograms) for what, histograms in self._model.ratios().items()}
        elif not found and not metric.labels:
            found = {(): Histogram(metric.bounds)}
        elif metric.labels == ("pool",):
            found = {(pool,): Histogram(metric.bounds) for pool in POOLS} | found
        for labels, histogram in found.items():
            family.add_metric(labels, _buckets(histogram), histogram.total)
        return family


def _family(family: GaugeMetricFamily | CounterMetricFamily, rows: Rows) -> Family:
    for labels, value in rows:
        family.add_metric(labels, value)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    buckets, num_below = [], 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        num_below += count
        buckets.append((floatToGoString(bound), float(num_below)))  # type: ignore[no-untyped-call]
    return buckets


def _gauges(now: Snapshot, tally: Tally) -> Mapping[str, Rows]:
    workers = now.status.workers

    def per_worker(value: Callable[[RoutedWorkerStatus], float]) -> Rows:
        return [((worker.role.value, worker.worker_id), value(worker)) for worker in workers]

    ready = [worker.role for worker in workers if worker.state is RoutingState.READY]
    return {
        "info": [((now.version, now.model), 1.0)],
        "num_requests_running": per_worker(lambda worker: worker.load.num_running),
        "num_requests_waiting": per_worker(lambda worker: worker.load.num_waiting),
        "kv_cache_usage_perc": per_worker(
            lambda worker: 1.0 - worker.load.num_free_blocks / worker.num_blocks
        ),
        "worker_restarts": [
            ((role.value, worker_id), count) for worker_id, (role, count) in now.restarts.items()
        ],
        "workers_ready": [((role.value,), ready.count(role)) for role in now.configured],
        "workers_configured": [((role.value,), count) for role, count in now.configured.items()],
        "hosts": [((state.value,), now.hosts.get(state, 0)) for state in HostState],
        "num_requests_queued": [((), now.status.num_queued)],
        "num_requests_live": [((), now.status.num_requests)],
        "slo_ttft_seconds": [((), tally.ttft_slo_s)],
        "slo_itl_seconds": [((), tally.itl_slo_s)],
        "planner_trust": [((), now.planner.trust)],
        "planner_predicted_goodput": [((), now.planner.predicted_goodput)],
        "head_stall_seconds": [((), now.stall_s)],
    }


def _counters(now: Snapshot) -> Mapping[str, float]:
    counts = now.status.counters
    return {
        "requests_admitted_total": counts.submitted,
        "requests_rejected_total": counts.rejected,
        "prompt_tokens_total": counts.prompt_tokens,
        "generation_tokens_total": counts.tokens,
        "dispatches_total": counts.dispatched,
        "dispatches_on_one_worker_total": counts.served_on_one,
        "dispatches_beyond_itl_total": counts.beyond_itl,
        "dispatches_retried_total": counts.retried,
        "dispatches_displaced_total": counts.displaced,
        "streams_resumed_total": counts.resumed,
        "streams_paused_total": counts.unread,
        "requests_expired_total": counts.expired,
        "requests_hopeless_total": counts.hopeless,
        "stale_messages_total": counts.stale,
        "planner_changes_total": now.planner.num_changes,
        "router_takeovers_total": now.num_takeovers,
        "trace_spans_total": now.num_spans,
    }
