"""A virtual cluster whose ratio a policy changes: the policy gets summaries as the head makes them, and the
fleet flips workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from msgspec import structs

from pdserve.core.messages import Role
from pdserve.head.planning import INTERVAL_S, MAX_OPEN, START_S
from pdserve.planner.changes import FLIP_S
from pdserve.planner.seen_load import seen_request
from pdserve.planner.virtual_cluster import ServedRequest, VirtualCluster, replaying
from pdserve.router.config import RouterConfig
from pdserve.router.events import Timeline, WorkerReady
from pdserve.router.fleet import Fleet
from pdserve.router.fleet_events import Apply, AssignRole
from pdserve.router.planning import Bounds, Objective, PoolLimits, Ratio, SeenRequest, Summary, Terms

from .profiles import Service
from .traffic import Traffic


@dataclass(frozen=True)
class Gauges:
    """The state of the workers at an instant."""

    queued_per_prefill: float  # requests that wait for their prompts, in the mean over prefill workers
    kv_usage: float  # share of the decode workers' blocks


class Policy(Protocol):
    """Chooses the ratio."""

    def decide(self, summary: Summary, gauges: Gauges) -> Ratio | None:
        """Called with every summary in order; None: no change."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a policy did."""

    served: Sequence[ServedRequest]
    are_good: Sequence[bool]
    changes: Sequence[tuple[float, Ratio]]

    @property
    def attainment(self) -> float:
        return sum(self.are_good) / len(self.are_good)

    def num_good(self, from_s: float, until_s: float) -> int:
        """Returns the good requests among those that arrived in this time."""
        return sum(
            good
            for one, good in zip(self.served, self.are_good, strict=True)
            if from_s <= one.arrived_s < until_s
        )


def terms_of(service: Service, horizon_s: float, router: RouterConfig) -> Terms:
    profile, most = service.profile, service.num_devices - 1
    limits = PoolLimits(profile.max_batch_tokens, profile.max_batch_size)
    assert service.slo.ttft is not None and service.slo.tpot is not None
    return Terms(
        objective=Objective.GOODPUT,
        horizon_s=horizon_s,
        bounds=Bounds(Ratio(1, 1), Ratio(most, most), service.num_devices),
        ttft_slo_s=service.slo.ttft / 1e3,
        itl_slo_s=service.slo.tpot / 1e3,
        router=router,
        layout=profile.layout,
        max_model_len=profile.max_model_len,
        prefill=limits,
        decode=limits,
        can_flip=True,
    )


@dataclass
class ChangingCluster:
    """Serves traffic once."""

    service: Service
    ratio: Ratio
    horizon_s: float
    prefill_on_decode: bool = True
    _seen: list[SeenRequest] = field(default_factory=list)
    _changes: list[tuple[float, Ratio]] = field(default_factory=list)
    _number: int = 0
    _num_arrived: int = 0
    _is_changing: bool = False

    def __post_init__(self) -> None:
        assert self.service.slo.tpot is not None
        router = replaying(RouterConfig(itl_slo_s=self.service.slo.tpot / 1e3), self.prefill_on_decode)
        self._terms = terms_of(self.service, self.horizon_s, router)
        roles = [role for role, size in self.ratio.sizes.items() for _ in range(size)]
        self._cluster = VirtualCluster(
            [self.service.profile.shape(role) for role in roles], self.service.profile.layout, router
        )
        self._cluster.on_closed = self._closed
        self._fleet = Fleet()
        self._fleet.handle(Apply(self.ratio.sizes), 0.0)
        names = iter(self._cluster.instances)
        self._names: dict[str, str] = {}  # the fleet's to the cluster's
        for status in sorted(self._fleet.status(), key=lambda one: one.role is not Role.PREFILL):
            name = self._names[status.worker_id] = next(names)
            info = self._cluster.instances[name].info
            ready = WorkerReady(
                structs.replace(info, worker_id=status.worker_id, incarnation=status.incarnation)
            )
            self._fleet.handle(ready, 0.0)
        assert self._fleet.is_reconciled

    def serve(self, traffic: Traffic, policy: Policy) -> Outcome:
        """Serves it to its end; the policy decides until the last arrival."""
        for number in range(1, ceil(traffic.duration_s / INTERVAL_S)):
            self._cluster.call_at(number * INTERVAL_S, lambda: self._sum_up(policy))
        served = self._cluster.serve(traffic.arrivals())
        return Outcome(served, [not one.misses(self.service.slo) for one in served], self._changes)

    def _closed(self, timeline: Timeline) -> None:
        if (request := seen_request(timeline, self._terms)) is not None:
            self._seen.append(request)

    def _sum_up(self, policy: Policy) -> None:
        router, now_s = self._cluster.router, self._cluster.now_s
        num_arrived = router.counters.submitted + router.counters.rejected
        summary = Summary(
            number=self._number,
            at_s=now_s,
            duration_s=INTERVAL_S,
            num_arrived=num_arrived - self._num_arrived,
            seen=tuple(self._seen),
            open=router.open_requests(MAX_OPEN),
            ratio=self.ratio,
            is_settled=not self._is_changing,
            instances=router.instance_facts(),
            latency=self._cluster.model.learnt,
            knows_latency=self._cluster.model.knows_prefill,
            start_s=START_S,
            terms=self._terms,
        )
        self._seen = []
        self._number += 1
        self._num_arrived = num_arrived
        to = policy.decide(summary, self._gauges())
        if to is not None and to != self.ratio and not self._is_changing:
            self._is_changing = True
            self._cluster.call_at(now_s + FLIP_S, lambda: self._change(to))

    def _change(self, to: Ratio) -> None:
        now_s = self._cluster.now_s
        num_legs = {one.worker_id: one.num_legs for one in self._cluster.router.status(now_s).workers}
        of_fleet = {ours: num_legs[theirs] for ours, theirs in self._names.items()}
        for action in self._fleet.handle(Apply(to.sizes, of_fleet), now_s):
            assert isinstance(action, AssignRole), f"{action} for {to}"
            self._cluster.assign(self._names[action.worker_id], action.role)
        self.ratio, self._is_changing = to, False
        self._changes.append((now_s, to))

    def _gauges(self) -> Gauges:
        workers = self._cluster.router.status(self._cluster.now_s).workers
        prefill = [one for one in workers if one.role is Role.PREFILL]
        decode = [one for one in workers if one.role is Role.DECODE]
        num_blocks = sum(one.num_blocks for one in decode)
        num_free = sum(one.load.num_free_blocks for one in decode)
        return Gauges(sum(one.num_legs for one in prefill) / len(prefill), 1 - num_free / num_blocks)
