"""The sums of workers' reports since the head's start: the durations of their steps, the arithmetic and
memory traffic of their shapes, and their GPUs' figures.

Called with every report of every worker: it only adds up; the rest is done when a scrape asks.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.histogram import TOKEN_GAPS_S, Histogram
from ..core.messages import StepReport, StepTiming, WorkerInfo
from ..router.events import RouterEvent, WorkerReady, WorkerRole
from ..router.status import RoutedWorkerStatus
from .gpus import GpuBoard

PHASES = ("prefill", "decode", "mixed")


@dataclass(slots=True)
class StepSums:
    """Steps of one pool and one phase."""

    durations: Histogram = field(default_factory=lambda: Histogram(TOKEN_GAPS_S))
    num_prefill_tokens: int = 0
    sum_prefill_squares: int = 0
    num_decode_sequences: int = 0
    num_context_tokens: int = 0

    def add(self, timing: StepTiming) -> None:
        """`Histogram.add` is written out here: this is done for every step."""
        durations, seconds = self.durations, timing.duration_s
        durations.counts[bisect_left(durations.bounds, seconds)] += 1
        durations.total += seconds
        self.num_decode_sequences += timing.num_decode_sequences
        self.num_context_tokens += timing.num_context_tokens
        if timing.num_prefill_tokens:
            self.num_prefill_tokens += timing.num_prefill_tokens
            self.sum_prefill_squares += timing.sum_prefill_squares


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Arithmetic and memory traffic of a model's steps, by their shapes."""

    flops_per_token: float  # FLOPs of the layers
    flops_per_sample: float  # FLOPs of the logits of one token
    flops_per_pair: float  # FLOPs of attention: a query and a key, all layers and heads
    weight_bytes: int
    kv_bytes_per_token: int

    def flops(self, steps: StepSums) -> float:
        """Attention within a prompt counts as if it were not causal, and a prompt's only logits not at
        all."""
        num_tokens = steps.num_prefill_tokens + steps.num_decode_sequences
        num_pairs = steps.sum_prefill_squares + steps.num_context_tokens
        samples = self.flops_per_sample * steps.num_decode_sequences
        return self.flops_per_token * num_tokens + self.flops_per_pair * num_pairs + samples

    def read_bytes(self, steps: StepSums) -> float:
        return (
            self.weight_bytes * steps.durations.num_measured
            + self.kv_bytes_per_token * steps.num_context_tokens
        )

    def write_bytes(self, steps: StepSums) -> float:
        return self.kv_bytes_per_token * (steps.num_prefill_tokens + steps.num_decode_sequences)


class _Worker:
    """An incarnation, and where its steps are added up."""

    __slots__ = ("cpu_s", "decode", "incarnation", "mixed", "node", "num_preemptions", "pool", "prefill")

    def __init__(self, info: WorkerInfo, sums: defaultdict[tuple[str, str], StepSums]) -> None:
        self.incarnation = info.incarnation
        self.node = info.node
        self.cpu_s: tuple[float, ...] = ()  # processor time of each rank
        self.num_preemptions: int | None = None  # as last reported; None: never reported
        self.join(info.role.value, sums)

    def join(self, pool: str, sums: defaultdict[tuple[str, str], StepSums]) -> None:
        self.pool = pool
        self.prefill, self.decode, self.mixed = (sums[pool, phase] for phase in PHASES)


class StepTally:
    """Fed with every event, before the router handles it."""

    def __init__(self) -> None:
        self.sums: defaultdict[tuple[str, str], StepSums] = defaultdict(StepSums)  # by pool and phase
        self.num_preemptions: defaultdict[str, int] = defaultdict(int)  # by pool
        self.gpus = GpuBoard()
        self._workers: dict[str, _Worker] = {}

    def observe(self, event: RouterEvent) -> None:
        if type(event) is StepReport:
            self._on_report(event)
        elif isinstance(event, WorkerReady):
            self._workers[event.info.worker_id] = _Worker(event.info, self.sums)
            self.gpus.forget(event.info.worker_id)
        elif isinstance(event, WorkerRole) and event.worker_id in self._workers:
            self._workers[event.worker_id].join(event.role.value, self.sums)

    def pool_of(self, worker_id: str) -> str:
        """The pool of a worker that has been ready."""
        return self._workers[worker_id].pool

    def cpu_s(self, workers: Iterable[RoutedWorkerStatus]) -> list[tuple[tuple[str, str, str], float]]:
        """Returns the processor time in seconds by pool, worker and rank."""
        return [
            ((one.role.value, one.worker_id, str(rank)), seconds)
            for one in workers
            if one.worker_id in self._workers
            for rank, seconds in enumerate(self._workers[one.worker_id].cpu_s)
        ]

    def _on_report(self, report: StepReport) -> None:
        worker = self._workers.get(report.worker_id)
        if worker is None or worker.incarnation != report.incarnation:
            return
        num_preemptions = report.load.num_preemptions
        if num_preemptions != worker.num_preemptions:
            if worker.num_preemptions is not None:
                self.num_preemptions[worker.pool] += num_preemptions - worker.num_preemptions
            worker.num_preemptions = num_preemptions
        worker.cpu_s = report.rank_cpu_s or worker.cpu_s
        if report.gpu is not None:
            self.gpus.add(report.worker_id, worker.node, report.gpu)
        timing = report.timing
        if timing is None:
            return
        if not timing.num_prefill_tokens:
            worker.decode.add(timing)
        elif timing.num_decode_sequences:
            worker.mixed.add(timing)
        else:
            worker.prefill.add(timing)
