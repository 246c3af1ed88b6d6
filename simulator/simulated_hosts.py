"""The hosts of a simulated cluster: their actual state, Ray's view, and a check that the head uses only
permitted ones."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from random import Random

from ..core.hosts import ExpectedHosts
from ..core.messages import Role
from ..router.cores import Capacity, Placement
from ..router.hosts import HostChecked, SeenHost
from .simulated_worker import SimulatedWorker
from .virtual_time import VirtualTime

NOTICE_S = (0.01, 0.3, 1.5)  # after a host's death, until Ray declares it dead
CHECK_S = (0.01, 0.1, 0.5)
CUT_CHECK_S = 1.0  # for a host that does not answer


@dataclass(frozen=True)
class PlannedHost:
    """One machine. The first one is the head's."""

    num_cores: int  # an instance takes one
    joins_s: float
    num_bytes: float = inf  # an instance takes one


class SimulatedHost:
    """One machine, through all its Ray nodes."""

    def __init__(self, name: str, plan: PlannedHost) -> None:
        self.name = name
        self.plan = plan
        self.num_joined = 0  # number of joins; Ray gives it a new id each time
        self.is_up = False
        self.is_seen = False  # by Ray, which notices a death later
        self.is_listed = True  # in the configuration in force
        self.cut_until_s = 0.0

    @property
    def node_id(self) -> str:
        return f"{self.name}.{self.num_joined}"


class SimulatedHosts:
    """All hosts, which go up and down by plan and by accident."""

    def __init__(
        self, time: VirtualTime, rng: Random, plans: tuple[PlannedHost, ...], violation: Callable[[str], None]
    ) -> None:
        self._time = time
        self._rng = rng
        self._violation = violation
        self.hosts = [SimulatedHost(f"h{number}", plan) for number, plan in enumerate(plans)]
        self._workers: list[tuple[SimulatedWorker, Placement]] = []
        self._reported: set[str] = set()  # the node ids last reported to a head
        for host in self.hosts:
            time.call_at(host.plan.joins_s, lambda host=host: self._join(host))  # type: ignore[misc]

    @property
    def others(self) -> list[SimulatedHost]:
        """Returns the hosts that may go down: all but the head's."""
        return self.hosts[1:]

    def seen(self) -> tuple[SeenHost, ...]:
        """Returns the hosts as Ray reports them."""
        seen = [host for host in self.hosts if host.is_seen]
        self._reported = {host.node_id for host in seen}
        return tuple(
            SeenHost(host.node_id, host.name, host.name, is_head=host is self.hosts[0]) for host in seen
        )

    def expected(self) -> ExpectedHosts:
        """Returns the hosts as the configuration in force names them."""
        return ExpectedHosts(tuple(host.name for host in self.others if host.is_listed))

    def check(self, node_id: str) -> tuple[float, HostChecked]:
        """Returns the time that the host takes to answer, and the answer; a host that is cut off gives
        none."""
        host = self._of(node_id)
        if host is None or not host.is_up or self._time.now_s < host.cut_until_s:
            return CUT_CHECK_S, HostChecked(node_id, Capacity(0), "it has not answered")
        num_bytes = host.plan.num_bytes - self._num_bytes_held(node_id)
        return self._rng.choice(CHECK_S), HostChecked(
            node_id, Capacity(host.plan.num_cores, num_bytes=num_bytes)
        )

    def _num_bytes_held(self, node_id: str) -> int:
        return sum(
            worker.spec.need.num_bytes
            for worker, at in self._workers
            if at.node_id == node_id and worker.process.is_alive
        )

    def take_down(self, host: SimulatedHost, seconds: float) -> None:
        """Takes a host down: its processes die at once; Ray notices later, and the host comes back after
        that."""
        if not host.is_up:
            return
        host.is_up = False
        for worker, placement in self._workers:
            if placement.node_id == host.node_id:
                worker.process.kill()
        notice_s = self._rng.choice(NOTICE_S)
        self._time.call_later(notice_s, lambda: setattr(host, "is_seen", False))
        self._time.call_later(max(seconds, notice_s) + 0.1, lambda: self._join(host))

    def is_up(self, node_id: str) -> bool:
        host = self._of(node_id)
        return host is not None and host.is_up

    def on(self, host: SimulatedHost) -> list[SimulatedWorker]:
        return [
            worker for worker, at in self._workers if at.node_id == host.node_id and worker.process.is_alive
        ]

    def started(
        self, worker: SimulatedWorker, placement: Placement, is_waiting: Callable[[Role], bool]
    ) -> None:
        """Records that a head has started a worker there. `is_waiting`: the first instance of a pool waits
        for a place."""
        self.serves(placement.node_id, f"{worker.process.name} is started")
        if placement.node_id not in self._reported:
            self._violation(
                f"{worker.process.name} is started on {placement.node_id}, which Ray has declared dead"
            )
        for other, taken in self._workers:
            if (
                taken.node_id == placement.node_id
                and other.process.is_alive
                and set(taken.cores) & set(placement.cores)
            ):
                self._violation(
                    f"{worker.process.name} gets cores of {other.process.name} on {placement.node_id}"
                )
        host = self._of(placement.node_id)
        if (
            host is not None
            and self._num_bytes_held(placement.node_id) + worker.spec.need.num_bytes > host.plan.num_bytes
        ):
            self._violation(f"{worker.process.name} has no memory on {placement.node_id}")
        roles = [other.spec.role for other, _ in self._workers if other.process.is_alive]
        if worker.spec.role in roles and not all(host.num_joined for host in self.hosts):
            for role in (Role.PREFILL, Role.DECODE):
                if role not in roles and role is not worker.spec.role and is_waiting(role):
                    self._violation(
                        f"{worker.process.name} takes the room of the first {role.value} instance"
                    )
        self._workers.append((worker, placement))
        if host is None or not host.is_up:  # Ray will report this once it notices
            self._time.call_later(max(NOTICE_S), worker.process.kill)

    def serves(self, node_id: str, what: str) -> None:
        """Checks that a host in use is one that the configuration names."""
        host = self._of(node_id)
        if host is not None and not host.is_listed:
            self._violation(f"{what} on {node_id}, which the configuration does not name")

    def _of(self, node_id: str) -> SimulatedHost | None:
        return next((host for host in self.hosts if host.node_id == node_id), None)

    def _join(self, host: SimulatedHost) -> None:
        if not host.is_up:
            host.num_joined += 1
            host.is_up = host.is_seen = True
