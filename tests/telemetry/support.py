"""A router with workers, as the router's tests have it, with a tally that watches as the head's does."""

from typing import Any

from pdserve.core.hosts import HostState
from pdserve.core.messages import Leg, LegEnded, Role, StepReport, StepTiming, TransferStats, WorkerLoad
from pdserve.router.events import RequestClosed, RouterCommand, RouterEvent, Timeline
from pdserve.router.planner_desk import PlannerState
from pdserve.telemetry.exposition import Exposition, Snapshot
from pdserve.telemetry.steps import StepCosts, StepTally
from pdserve.telemetry.tally import Tally

from ..router.cluster import Cluster

COSTS = StepCosts(
    flops_per_token=100.0, flops_per_sample=10.0, flops_per_pair=1.0, weight_bytes=1000, kv_bytes_per_token=8
)
STATS = TransferStats(num_bytes=3 << 20, num_chunks=3, duration_s=0.02, exposed_s=0.004, hidden_bytes=2 << 20)


class Watched(Cluster):
    """Tallies all events; `values` is the result of a scrape."""

    def __init__(self, *workers: Any, **options: Any) -> None:
        self.steps = StepTally()
        self.tally = Tally(self.steps, ttft_slo_s=0.2, itl_slo_s=0.05)
        self.timelines: list[Timeline] = []
        super().__init__(*workers, **options)
        self.exposition = Exposition(self.tally, self.steps, COSTS, self.router.model, self.snapshot)

    def handle(self, event: RouterEvent) -> list[RouterCommand]:
        self.steps.observe(event)
        commands = super().handle(event)
        for command in commands:
            if isinstance(command, RequestClosed):
                self.timelines.append(command.timeline)
                self.tally.closed(command.timeline)
        return commands

    def snapshot(self) -> Snapshot:
        return Snapshot(
            status=self.router.status(self.now_s),
            token_gaps=self.router.token_gaps,
            configured={Role.PREFILL: 1, Role.DECODE: 1},
            restarts={"decode-0": (Role.DECODE, 2)},
            hosts={HostState.JOINED: 2, HostState.LOST: 1},
            planner=PlannerState(num_changes=3),
            num_takeovers=1,
            num_spans=0,
            stall_s=0.25,
            version="1.2.3",
            model="tiny",
        )

    def values(self) -> dict[str, float]:
        """Each series that is not 0, as it is written in the exposition."""
        return nonzero(self.exposition.render())

    def end_leg(self, worker_id: str, leg: Leg, **account: Any) -> None:
        """The worker's own account of its last work."""
        transfer = self.spec(worker_id).transfer
        self.handle(LegEnded(worker_id=worker_id, incarnation=1, transfer=transfer, leg=leg, **account))

    def step(self, worker_id: str, timing: StepTiming | None = None, **load: int) -> None:
        self.handle(StepReport(worker_id=worker_id, incarnation=1, load=WorkerLoad(**load), timing=timing))


def nonzero(exposition: bytes) -> dict[str, float]:
    series = (line.rsplit(" ", 1) for line in exposition.decode().splitlines() if line.startswith("pdserve_"))
    return {name.removeprefix("pdserve_"): float(value) for name, value in series if float(value)}


def timing(
    prefill: int = 0, squares: int = 0, sequences: int = 0, context: int = 0, seconds: float = 0.01
) -> StepTiming:
    return StepTiming(
        num_prefill_tokens=prefill,
        sum_prefill_squares=squares,
        num_decode_sequences=sequences,
        num_context_tokens=context,
        duration_s=seconds,
    )
