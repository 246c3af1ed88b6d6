"""What requests, transfers and steps came to since the head's start. Events and timelines in, numbers out: no clock, no I/O.

What the router counts by itself (`router.status.Counters`, `router.histogram.TokenGaps`) is not counted here again.
"""

from collections import defaultdict
from dataclasses import dataclass

from ..core.latency import LatencyModel
from ..core.messages import StepReport, StepTiming, TransferStats
from ..core.request import FinishReason
from ..router.events import DispatchTimes, RouterEvent, Timeline, WorkerReady, WorkerRole
from ..router.histogram import Histogram
from . import legs
from .catalogue import HISTOGRAMS

Labels = tuple[str, ...]
ANSWERS = (FinishReason.STOP, FinishReason.LENGTH)
MET, MISSED = "met", "missed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Arithmetic and memory traffic of a model's steps, by their shapes."""

    flops_per_token: float  # of the layers
    flops_per_sample: float  # of the logits of one token
    flops_per_pair: float  # of attention: a query and a key, all layers and heads
    weight_bytes: int
    kv_bytes_per_token: int

    def flops(self, timing: StepTiming) -> float:
        """Attention within a prompt counts as if it were not causal, and a prompt's only logits not at all."""
        num_tokens = timing.num_prefill_tokens + timing.num_decode_sequences
        num_pairs = timing.sum_prefill_squares + timing.num_context_tokens
        samples = self.flops_per_sample * timing.num_decode_sequences
        return self.flops_per_token * num_tokens + self.flops_per_pair * num_pairs + samples

    def memory_bytes(self, timing: StepTiming) -> float:
        """Weights once, the context of decoding sequences, and what is new."""
        num_tokens = timing.num_context_tokens + timing.num_prefill_tokens + timing.num_decode_sequences
        return self.weight_bytes + self.kv_bytes_per_token * num_tokens


@dataclass(slots=True)
class _Worker:
    pool: str
    incarnation: int
    num_preemptions: int | None = None  # as last told; None: it has not said


class Tally:
    """Fed by `observe` with every event before the router handles it, and by `closed` with every timeline that is complete."""

    def __init__(self, model: LatencyModel, costs: StepCosts, *, ttft_slo_s: float, itl_slo_s: float) -> None:
        self.ttft_slo_s, self.itl_slo_s = ttft_slo_s, itl_slo_s  # may change
        self.counts: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self.histograms: dict[tuple[str, Labels], Histogram] = {}
        self._model = model
        self._costs = costs
        self._workers: dict[str, _Worker] = {}
        self._bounds = {metric.name: metric.bounds for metric in HISTOGRAMS}

    def observe(self, event: RouterEvent) -> None:
        """What workers report of their steps."""
        match event:
            case StepReport():
                self._on_report(event)
            case WorkerReady(info=info):
                self._workers[info.worker_id] = _Worker(info.role.value, info.incarnation)
            case WorkerRole(worker_id=worker_id, role=role):
                if worker_id in self._workers:
                    self._workers[worker_id].pool = role.value
            case _:
                pass

    def closed(self, timeline: Timeline) -> None:
        """A request is over, and nobody has anything to add."""
        outcome = timeline.outcome
        assert outcome is not None, "a closed request has ended"
        self.counts["request_success_total", (outcome.value,)] += 1
        for dispatch in timeline.dispatches:
            self._dispatch(dispatch)
        if timeline.is_adopted:
            return  # an earlier router knew its times
        if timeline.first_token_s is not None:
            self._first_token(timeline, timeline.first_token_s)
        if outcome in ANSWERS:
            self._answer(timeline)
        if outcome is not FinishReason.CANCELLED and not timeline.num_pauses:
            self._judge(timeline, outcome in ANSWERS)

    def _add(self, name: str, value: float, *labels: str) -> None:
        histogram = self.histograms.get((name, labels))
        if histogram is None:
            histogram = self.histograms[name, labels] = Histogram(self._bounds[name])
        histogram.add(value)

    # steps

    def _on_report(self, report: StepReport) -> None:
        worker = self._workers.get(report.worker_id)
        if worker is None or worker.incarnation != report.incarnation:
            return
        num_preemptions = report.load.num_preemptions
        if worker.num_preemptions is not None and num_preemptions > worker.num_preemptions:
            self.counts["num_preemptions_total", (worker.pool,)] += num_preemptions - worker.num_preemptions
        worker.num_preemptions = num_preemptions
        if report.timing is not None:
            self._step(worker.pool, report.timing)

    def _step(self, pool: str, timing: StepTiming) -> None:
        is_mixed = timing.num_prefill_tokens and timing.num_decode_sequences
        phase = "mixed" if is_mixed else "prefill" if timing.num_prefill_tokens else "decode"
        self._add("step_duration_seconds", timing.duration_s, pool, phase)
        self._add("prediction_ratio", timing.duration_s / self._model.step_s(timing), f"{phase}_step")
        self.counts["estimated_flops_total", (pool,)] += self._costs.flops(timing)
        self.counts["estimated_memory_bytes_total", (pool,)] += self._costs.memory_bytes(timing)

    # requests

    def _first_token(self, timeline: Timeline, first_token_s: float) -> None:
        self._add("time_to_first_token_seconds", first_token_s - timeline.submitted_s)
        bringer = next(dispatch for dispatch in timeline.dispatches if dispatch.first_token_s is not None)
        self._add("request_queue_time_seconds", bringer.dispatched_s - timeline.submitted_s)
        told, prefill_s = legs.account(bringer), legs.prefill_s(bringer)
        if told is not None and prefill_s is not None:
            self._add("request_worker_queue_time_seconds", told.queue_s)
            self._add("request_prefill_time_seconds", prefill_s)
            rest_s = first_token_s - bringer.dispatched_s - told.queue_s - prefill_s
            self._add("request_overhead_time_seconds", max(0.0, rest_s))

    def _answer(self, timeline: Timeline) -> None:
        self._add("e2e_request_latency_seconds", timeline.ended_s - timeline.submitted_s)
        self._add("request_prompt_tokens", timeline.num_prompt_tokens)
        self._add("request_generation_tokens", sum(timeline.num_output_tokens))
        if timeline.first_token_s is not None:
            self._add("request_decode_time_seconds", timeline.ended_s - timeline.first_token_s)
        if (gap_s := legs.request_gap_s(timeline)) is not None:
            self._add("request_time_per_output_token_seconds", gap_s)

    def _judge(self, timeline: Timeline, is_answer: bool) -> None:
        first_token_s, gap_s = timeline.first_token_s, legs.request_gap_s(timeline)
        is_soon = first_token_s is not None and first_token_s - timeline.submitted_s <= self.ttft_slo_s
        flows = gap_s is None or gap_s <= self.itl_slo_s
        verdicts = (MET if is_answer and is_soon else MISSED, MET if is_answer and flows else MISSED)
        self.counts["slo_requests_total", verdicts] += 1

    def _dispatch(self, dispatch: DispatchTimes) -> None:
        told = legs.account(dispatch)
        if told is not None and dispatch.first_token_s is not None:
            pool = self._workers[told.worker_id].pool
            self.counts["prefix_cache_queries_total", (pool,)] += dispatch.num_tokens
            self.counts["prefix_cache_hits_total", (pool,)] += told.num_cached_tokens
        if dispatch.prefill is not None and dispatch.prefill.stats is not None:
            self._transfer(dispatch, dispatch.prefill.stats)
        if dispatch.first_token_s is not None and dispatch.expected_ttft_s > 0:
            self._add("prediction_ratio", (dispatch.first_token_s - dispatch.dispatched_s) / dispatch.expected_ttft_s, "ttft")
        gap_s = legs.gap_s(dispatch)
        if gap_s is not None and dispatch.expected_itl_s > 0:
            self._add("prediction_ratio", gap_s / dispatch.expected_itl_s, "itl")

    def _transfer(self, dispatch: DispatchTimes, stats: TransferStats) -> None:
        self._add("kv_transfer_bytes", stats.num_bytes)
        self._add("kv_transfer_seconds", stats.duration_s)
        self._add("kv_transfer_exposed_seconds", stats.exposed_s)
        if dispatch.expected_transfer_s > 0:
            self._add("prediction_ratio", stats.exposed_s / dispatch.expected_transfer_s, "transfer")
        if (wait_s := legs.kv_wait_s(dispatch)) is not None:
            self._add("request_kv_wait_time_seconds", wait_s)
