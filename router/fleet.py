"""The reconcile loop. In: desired pool sizes and workers' events. Out: workers to start, drain, flip and
stop."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.messages import Role
from .events import WorkerIdle, WorkerLost, WorkerReady
from .fleet_events import (
    AdoptWorkers,
    Apply,
    AssignRole,
    Drain,
    DrainWorker,
    FleetAction,
    FleetEvent,
    HostJoined,
    ReplaceWorkers,
    Shutdown,
    StartWorker,
    StopWorker,
    WorkerLoading,
    WorkerPlaced,
)
from .fleet_member import Member, MemberState, MemberStatus
from .roster import REMOVAL_ORDER, Roster


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    drain_timeout_s: float = 120.0
    start_timeout_s: float = 600.0  # without any progress
    num_start_beats: int = 10  # in which that is counted: a delay of our own counts as one
    # A worker of an earlier controller must report within this many beats: a delay of our own counts as
    # one.
    adoption_beat_s: float = 0.5
    num_adoption_beats: int = 6
    backoff_s: float = 1.0  # after the first consecutive failure; doubles with each
    max_backoff_s: float = 60.0
    stable_s: float = 30.0  # a worker that was ready for at least this long has not failed to start
    can_flip: bool = True  # pools are similar enough for a worker of one to serve in another


class Fleet:
    """Moves the observed workers towards the desired pools."""

    def __init__(self, config: FleetConfig | None = None, first_incarnation: int = 1) -> None:
        """`first_incarnation` is above every incarnation that an earlier controller has started."""
        self.config = config or FleetConfig()
        self.is_shutting_down = False
        self._desired: dict[Role, int] = {}
        self._num_legs: Mapping[str, int] = {}
        self._roster = Roster()
        self._next_incarnation = first_incarnation
        self._out: list[FleetAction] = []

    @property
    def is_stopped(self) -> bool:
        """Whether the fleet is shut down and no process is left."""
        return self.is_shutting_down and not len(self._roster)

    @property
    def is_serving(self) -> bool:
        """Whether a worker is ready, and the fleet is not to shut down."""
        return not self.is_shutting_down and self._roster.num_in(MemberState.READY) > 0

    @property
    def is_settled(self) -> bool:
        """Whether each adopted worker has reported or is given up."""
        return not self._roster.num_awaited

    @property
    def is_reconciled(self) -> bool:
        """Whether the workers are those that are desired, all of them ready."""
        members = list(self._roster)
        ready = Counter(member.role for member in members if member.state is MemberState.READY)
        return len(members) == sum(self._desired.values()) and all(
            ready[role] == size for role, size in self._desired.items()
        )

    @property
    def num_expected(self) -> int:
        """The number of workers that are starting or will be: the router's WorkersExpected."""
        return self._roster.num_in(MemberState.STARTING, MemberState.BACKOFF)

    def status(self) -> tuple[MemberStatus, ...]:
        return tuple(
            MemberStatus(
                m.worker_id,
                m.role,
                m.state,
                m.incarnation,
                m.since_s,
                m.num_failures,
                m.num_restarts,
                m.last_error,
                m.due_s,
            )
            for m in sorted(self._roster, key=lambda m: m.worker_id)
        )

    def next_tick_s(self) -> float | None:
        return self._roster.next_s(restarts=self.is_settled)  # nothing is started again before

    def handle(self, event: FleetEvent, now_s: float) -> list[FleetAction]:
        self._out = []
        match event:
            case AdoptWorkers():
                self._adopt(event, now_s)
            case Apply():
                self._apply(event, now_s)
            case Drain():
                self._drain_by_hand(event, now_s)
            case ReplaceWorkers(workers):
                self._replace(workers, now_s)
            case HostJoined():
                for member in self._roster:
                    member.num_failures = 0
                    if member.state is MemberState.BACKOFF:
                        member.due_s = now_s
                        self._roster.note(member)
            case Shutdown():
                self.is_shutting_down, self._desired = True, {}
                for member in self._roster:
                    self._release(member)
            case WorkerReady():
                ready = self._current(event.info.worker_id, event.info.incarnation)
                if ready is not None and ready.state is MemberState.STARTING:
                    self._enter(ready, MemberState.READY, now_s)
            case WorkerPlaced():
                placed = self._current(event.worker_id, event.incarnation)
                if placed is not None and placed.state is MemberState.STARTING:
                    placed.since_s = now_s
                    self._wait_for_start(placed, now_s)
            case WorkerLoading():
                loading = self._current(event.worker_id, event.incarnation)
                if loading is not None and loading.state is MemberState.STARTING:
                    if loading.is_awaited or loading.progress != event.progress:
                        self._wait_for_start(loading, now_s)
                    loading.is_awaited, loading.progress = False, event.progress
                    self._roster.note(loading)
            case WorkerLost():
                self._ended(event.worker_id, event.incarnation, event.reason, now_s)
            case WorkerIdle():
                idle = self._current(event.worker_id, event.incarnation)
                if idle is not None and idle.state is MemberState.DRAINING:
                    self._stop(idle, now_s)
        self._lose_patience(now_s)
        if self.is_settled:
            self._reconcile(now_s)
        return self._out

    def _wait_for_start(self, member: Member, now_s: float) -> None:
        num_beats = self.config.num_start_beats
        member.wait(self.config.start_timeout_s / num_beats, num_beats, now_s)
        self._roster.note(member)

    def _enter(self, member: Member, target: MemberState, now_s: float, due_s: float | None = None) -> None:
        member.enter(target, now_s, due_s)
        self._roster.note(member)

    def _release(self, member: Member) -> None:
        """Leaves a member that an operator drained to the fleet again."""
        if member.by_hand:
            member.by_hand = False
            self._roster.note(member)

    def _current(self, worker_id: str, incarnation: int) -> Member | None:
        member = self._roster.get(worker_id)
        return member if member is not None and member.incarnation == incarnation else None

    def _adopt(self, event: AdoptWorkers, now_s: float) -> None:
        for worker in event.workers:
            member = Member(worker.worker_id, worker.role, worker.incarnation, now_s, is_awaited=True)
            member.wait(self.config.adoption_beat_s, self.config.num_adoption_beats, now_s)
            self._roster.note(member)

    def _apply(self, event: Apply, now_s: float) -> None:
        if self.is_shutting_down:
            return
        self._desired = dict(event.pools)
        self._num_legs = event.num_legs
        for member in self._roster:
            self._release(member)
            if member.state is MemberState.DRAINED:
                self._remove(member, now_s)

    def _drain_by_hand(self, event: Drain, now_s: float) -> None:
        member = self._roster.get(event.worker_id)
        drainable = (MemberState.STARTING, MemberState.READY, MemberState.BACKOFF)
        if member is not None and member.state in drainable:
            member.by_hand = True
            self._roster.note(member)
            self._retire(member, now_s)

    def _replace(self, workers: Sequence[tuple[str, int]], now_s: float) -> None:
        replaceable = (MemberState.STARTING, MemberState.READY, MemberState.DRAINING)
        for member in [self._current(*worker) for worker in workers]:
            if member is not None and member.state in replaceable:
                member.is_replaced = True
                if member.state is not MemberState.DRAINING:
                    self._retire(member, now_s)

    def _ended(self, worker_id: str, incarnation: int, reason: str, now_s: float) -> None:
        """A process is gone, for whatever reason."""
        member = self._current(worker_id, incarnation)
        if member is None:
            return
        match member.state:
            case MemberState.STARTING:
                self._back_off(member, reason, member.num_failures + 1, now_s)
            case MemberState.READY:
                served_s = now_s - member.since_s
                num_failures = 0 if served_s >= self.config.stable_s else member.num_failures + 1
                self._back_off(member, reason, num_failures, now_s, served_s)
            case MemberState.DRAINING | MemberState.STOPPING:
                self._remove(member, now_s)
            case MemberState.BACKOFF:
                member.last_error = reason  # its connection was lost before; this reason is more specific
            case MemberState.DRAINED | MemberState.GONE:
                pass

    def _back_off(
        self, member: Member, reason: str, num_failures: int, now_s: float, served_s: float = float("inf")
    ) -> None:
        """Delays the next start, so that weights are not loaded over and over; a worker that has served waits
        no longer than it served."""
        member.last_error, member.num_failures = reason, num_failures
        least_s = self.config.backoff_s
        most_s = min(self.config.max_backoff_s, max(least_s, served_s))
        delay_s = min(least_s * 2.0 ** min(num_failures - 1, 32), most_s) if num_failures else 0.0
        self._enter(member, MemberState.BACKOFF, now_s, now_s + delay_s)

    def _remove(self, member: Member, now_s: float) -> None:
        """Takes a member whose process is gone out of the fleet, or out of service until the next Apply."""
        self._enter(member, MemberState.DRAINED if member.by_hand else MemberState.GONE, now_s)

    def _stop(self, member: Member, now_s: float) -> None:
        self._enter(member, MemberState.STOPPING, now_s)
        self._out.append(StopWorker(member.worker_id, member.incarnation))

    def _retire(self, member: Member, now_s: float) -> None:
        """Takes a member out of service, gently when it has streams."""
        match member.state:
            case MemberState.READY:
                self._enter(member, MemberState.DRAINING, now_s, now_s + self.config.drain_timeout_s)
                self._out.append(DrainWorker(member.worker_id))
            case MemberState.STARTING:
                self._stop(member, now_s)
            case MemberState.DRAINED:  # by hand, and nobody waits for its return
                self._release(member)
                self._remove(member, now_s)
            case _:
                self._remove(member, now_s)

    def _lose_patience(self, now_s: float) -> None:
        for member in self._roster.pop_due(now_s):
            if member.state is MemberState.DRAINING:
                self._stop(member, now_s)
            elif member.state is MemberState.STARTING:
                self._late(member, now_s)

    def _late(self, member: Member, now_s: float) -> None:
        if member.num_beats_left > 1:
            member.wait(member.beat_s, member.num_beats_left - 1, now_s)
            self._roster.note(member)
            return
        reason = f"not {'reconnected' if member.is_awaited else 'ready'} after {now_s - member.since_s:.0f} s"
        if not member.is_awaited:
            reason += f", without any progress for {self.config.start_timeout_s:.0f} s"
        self._out.append(StopWorker(member.worker_id, member.incarnation, reason))
        self._back_off(member, reason, member.num_failures + 1, now_s)

    def _reconcile(self, now_s: float) -> None:
        roles = {*self._desired, *self._roster.roles}
        missing: list[Role] = []
        surplus: list[Member] = []
        for role in sorted(roles, key=lambda role: role.value):
            excess = self._roster.num_present(role) - self._desired.get(role, 0)
            missing += [role] * -excess
            if excess > 0:
                surplus += self._first_to_go(self._roster.present(role))[:excess]
        for role in missing:
            donor = self._donor(role, surplus)
            if donor is None:
                self._start_new(role, now_s)
                continue
            surplus = [member for member in surplus if member is not donor]
            self._assign(donor, role, now_s)
        for member in surplus:
            self._retire(member, now_s)
        self._restart_due(now_s)

    def _first_to_go(self, members: list[Member]) -> list[Member]:
        """Returns members in order of removal: idle ones, then the least loaded, of those the newest."""
        going = [member for member in members if member.state in REMOVAL_ORDER]
        return sorted(
            going,
            key=lambda m: (REMOVAL_ORDER.index(m.state), self._num_legs.get(m.worker_id, 0), -m.incarnation),
        )

    def _donor(self, role: Role, surplus: list[Member]) -> Member | None:
        """Returns a running worker that would otherwise be removed, which saves loading weights."""
        draining = [
            m
            for m in (self._roster if self._roster.num_in(MemberState.DRAINING) else ())
            if m.state is MemberState.DRAINING and not m.by_hand and not m.is_replaced
        ]
        candidates = draining + [m for m in surplus if m.state is MemberState.READY and not m.by_hand]
        alike = [m for m in candidates if m.role is role]
        return next(iter(alike or (candidates if self.config.can_flip else [])), None)

    def _assign(self, member: Member, role: Role, now_s: float) -> None:
        if member.state is MemberState.DRAINING:
            member.enter(MemberState.READY, now_s)
        member.role = role
        self._roster.note(member)
        self._out.append(AssignRole(member.worker_id, role))

    def _start_new(self, role: Role, now_s: float) -> None:
        self._start(Member(self._roster.free_name(), role, 0, now_s), now_s)

    def _restart_due(self, now_s: float) -> None:
        for member in self._roster.pop_restarts(now_s):
            member.enter(MemberState.STARTING, now_s)
            member.num_restarts += 1
            self._start(member, now_s)

    def _start(self, member: Member, now_s: float) -> None:
        member.incarnation, member.is_awaited, member.due_s = self._next_incarnation, False, None
        member.progress = None
        self._roster.note(member)
        self._next_incarnation += 1
        self._out.append(StartWorker(member.role, member.worker_id, member.incarnation))
