"""A fleet with a clock, for tests."""

from collections.abc import Mapping

from pdserve.core.messages import Role
from pdserve.router.events import WorkerLost, WorkerReady
from pdserve.router.fleet import Fleet, FleetConfig
from pdserve.router.fleet_events import (
    Apply,
    FleetAction,
    FleetEvent,
)
from pdserve.router.fleet_member import MemberState

from .cluster import worker_info

P, D = Role.PREFILL, Role.DECODE


class FleetAt:
    """A fleet with a clock; workers become ready on the test's request."""

    def __init__(self, *ready: Role, config: FleetConfig | None = None) -> None:
        self.fleet = Fleet(config)
        self.now_s = 0.0
        if ready:
            self.apply({role: ready.count(role) for role in (P, D)})
            for number in range(len(ready)):
                self.ready(f"worker-{number}")

    def handle(self, event: FleetEvent, after_s: float = 0.0) -> list[FleetAction]:
        self.now_s += after_s
        return self.fleet.handle(event, self.now_s)

    def apply(self, pools: dict[Role, int], num_legs: Mapping[str, int] | None = None) -> list[FleetAction]:
        return self.handle(Apply(pools, num_legs or {}))

    def incarnation(self, worker_id: str) -> int:
        return next(m.incarnation for m in self.fleet.status() if m.worker_id == worker_id)

    def ready(self, worker_id: str) -> list[FleetAction]:
        return self.handle(WorkerReady(worker_info(worker_id, P, incarnation=self.incarnation(worker_id))))

    def lost(self, worker_id: str, after_s: float = 0.0) -> list[FleetAction]:
        return self.handle(WorkerLost(worker_id, self.incarnation(worker_id), "killed"), after_s)

    def states(self) -> dict[str, tuple[Role, MemberState]]:
        return {m.worker_id: (m.role, m.state) for m in self.fleet.status()}
