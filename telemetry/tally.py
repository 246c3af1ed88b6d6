"""The sums of requests and transfers since the head's start: timelines in, numbers out, no clock and no I/O.

The router's own counters (`router.status.Counters`, `core.histogram.TokenGaps`) are not repeated here."""

from collections import defaultdict

from ..core.histogram import Histogram
from ..core.messages import TransferStats
from ..core.request import FinishReason
from ..router.events import DispatchTimes, Timeline
from . import legs
from .catalogue import HISTOGRAMS
from .steps import StepTally

Labels = tuple[str, ...]
CLIENTS_DOING = (FinishReason.CANCELLED, FinishReason.INVALID)  # no latency would have been right
ANSWERS = (FinishReason.STOP, FinishReason.LENGTH)
MET, MISSED = "met", "missed"


class Tally:
    """Fed with every timeline that is complete. `steps` supplies the pools of workers."""

    def __init__(self, steps: StepTally, *, ttft_slo_s: float, itl_slo_s: float) -> None:
        self.ttft_slo_s, self.itl_slo_s = ttft_slo_s, itl_slo_s  # may change
        self.counts: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self.histograms: dict[tuple[str, Labels], Histogram] = {}
        self._steps = steps
        self._bounds = {metric.name: metric.bounds for metric in HISTOGRAMS}

    def closed(self, timeline: Timeline) -> None:
        """Records a request that is over and will not be reported on again."""
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
        if outcome not in CLIENTS_DOING and not timeline.num_times_unread:
            self._judge(timeline, outcome in ANSWERS)

    def _add(self, name: str, value: float, *labels: str) -> None:
        histogram = self.histograms.get((name, labels))
        if histogram is None:
            histogram = self.histograms[name, labels] = Histogram(self._bounds[name])
        histogram.add(value)

    def _first_token(self, timeline: Timeline, first_token_s: float) -> None:
        self._add("time_to_first_token_seconds", first_token_s - timeline.submitted_s)
        bringer = next(dispatch for dispatch in timeline.dispatches if dispatch.first_token_s is not None)
        self._add("request_queue_time_seconds", bringer.dispatched_s - timeline.submitted_s)
        report, prefill_s = legs.account(bringer), legs.prefill_s(bringer)
        if report is not None and prefill_s is not None:
            pool = self._steps.pool_of(report.worker_id)
            self._add("request_worker_queue_time_seconds", report.queue_s, pool)
            self._add("request_prefill_time_seconds", prefill_s, pool)
            rest_s = first_token_s - bringer.dispatched_s - report.queue_s - prefill_s
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
        report = legs.account(dispatch)
        if report is not None and dispatch.first_token_s is not None:
            pool = self._steps.pool_of(report.worker_id)
            self.counts["prefix_cache_queries_total", (pool,)] += dispatch.num_tokens
            self.counts["prefix_cache_hits_total", (pool,)] += report.num_cached_tokens
        if dispatch.prefill is not None and dispatch.prefill.stats is not None:
            self._transfer(dispatch, dispatch.prefill.stats)
        if dispatch.first_token_s is not None and dispatch.expected_ttft_s > 0:
            self._add(
                "prediction_ratio",
                (dispatch.first_token_s - dispatch.dispatched_s) / dispatch.expected_ttft_s,
                "ttft",
            )
        gap_s = legs.gap_s(dispatch)
        if gap_s is not None and dispatch.expected_itl_s > 0:
            self._add("prediction_ratio", gap_s / dispatch.expected_itl_s, "itl")

    def _transfer(self, dispatch: DispatchTimes, stats: TransferStats) -> None:
        self._add("kv_transfer_bytes", stats.num_bytes)
        self._add("kv_transfer_seconds", stats.duration_s)
        self._add("kv_transfer_exposed_seconds", stats.exposed_s)
        if (wait_s := legs.kv_wait_s(dispatch)) is not None:
            self._add("request_kv_wait_time_seconds", wait_s)
