"""Decides which worker processes exist, and when each starts, is asked to end, and is killed.

The fleet decides which workers are wanted, `Places` where there is room; the supervisor follows each process
from StartWorker to its end. It uses neither Ray nor a clock: the head's controller carries its commands out
over Ray, the simulator in virtual time.

WAITING -> STARTING -> SERVING -> ENDING -> KILLED -> gone
    |          |        |  ^  |      |
    |          |       AWAY   |      |   (it hung up since we had stood still, and reconnects)
    +----------+----------+---+------+-> gone, for any reason; only then are its cores given to another
"""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..core.messages import HEARTBEAT_S, HostFull, Role, WorkerInfo
from ..core.needs import Need
from .cores import Key, Placement
from .events import Adopted, LossCause, WorkerDraining, WorkerLost, WorkerReady, WorkerRole, WorkersExpected
from .fleet import Fleet
from .fleet_events import (
    AdoptWorkers,
    Apply,
    AssignRole,
    DrainWorker,
    FleetAction,
    FleetEvent,
    StartWorker,
    StopWorker,
    WorkerLoading,
    WorkerPlaced,
)
from .places import Places
from .timetable import Timetable

GENERATION_STRIDE = 10**9  # of incarnations and of attempts: those of the next head are above all of this one
LATE_S = HEARTBEAT_S  # by which only a head that stood still looks at what is due
STOP_TIMEOUT_S = 5.0  # a process that does not end by itself is killed after this
# A worker that is away must be back within this many beats: a delay of our own counts as one.
NUM_AWAY_BEATS = 6


class Launchable(Protocol):
    """Describes one incarnation of a worker to the component that starts its process."""

    @property
    def key(self) -> Key: ...
    @property
    def role(self) -> Role: ...
    @property
    def need(self) -> Need: ...


S = TypeVar("S", bound=Launchable)


class ProcessState(enum.Enum):
    """The stages of a process between StartWorker and its end."""

    WAITING = "waiting"  # for a place
    STARTING = "starting"  # or reconnecting: an earlier head started it
    SERVING = "serving"  # it has been ready
    AWAY = "away"  # it has been ready, and hung up since we had stood still
    ENDING = "ending"  # asked to end, killed if it takes too long
    KILLED = "killed"


@dataclass(slots=True)
class SupervisedProcess(Generic[S]):
    """One incarnation of a worker, from StartWorker or its take-over until its process is gone."""

    spec: S
    started_s: float
    state: ProcessState = ProcessState.WAITING
    phase: str = "starting a process"
    fraction: float = 0.0
    info: WorkerInfo | None = None  # None until it is ready
    end_reason: str | None = None  # why it is to end
    due_s: float | None = None  # ENDING: when patience ends; AWAY: the next beat
    num_beats_left: int = 0  # AWAY: until patience ends
    start_s: float | None = None  # how long it took from its launch until it was ready; of our own ones
    launched_s: float | None = None
    may_have_died: bool = False  # its connection ended by itself: perhaps with it, before we kill it

    @property
    def is_expected(self) -> bool:
        """Whether the process is presumed to be running, and is not to end."""
        return self.end_reason is None

    @property
    def is_serving(self) -> bool:
        return self.state is ProcessState.SERVING


@dataclass(frozen=True, slots=True)
class AdoptProcesses(Generic[S]):
    """Processes that an earlier head has started, oldest first. Only the newest of each name is kept."""

    living: tuple[tuple[S, Placement], ...]


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """The worker is still starting; `fraction` of its present phase is done."""

    worker_id: str
    incarnation: int
    phase: str
    fraction: float


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The router has lost a worker's connection. `is_silent`: the worker fell silent, and the router hung up.
    `comes_back`: the router fell silent, and the worker hung up; or it has connected again already."""

    worker_id: str
    incarnation: int
    reason: str
    is_silent: bool = False
    comes_back: bool = False

    @property
    def key(self) -> Key:
        return self.worker_id, self.incarnation


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """Nothing is left of a process. `is_explained`: the worker itself reported why. `has_died`: it did not
    end in order, and its host is up."""

    worker_id: str
    incarnation: int
    reason: str
    is_explained: bool = False
    has_died: bool = False


SupervisorEvent = FleetEvent | AdoptProcesses[S] | WorkerProgress | ConnectionLost | ProcessEnded | HostFull


@dataclass(frozen=True, slots=True)
class LaunchProcess(Generic[S]):
    """Starts the process; answered by ProcessEnded when it ends for any reason."""

    spec: S
    placement: Placement


@dataclass(frozen=True, slots=True)
class EndProcess:
    """Asks the process to end."""

    key: Key


@dataclass(frozen=True, slots=True)
class KillProcess:
    """Ends the process immediately."""

    key: Key


@dataclass(frozen=True, slots=True)
class SuspectHost:
    """A process there ended, or its connection broke, for no known reason: the host may be in trouble."""

    node_id: str


@dataclass(frozen=True, slots=True)
class RefuseHost:
    """A worker there reports which parts of the host are full, and their sizes in bytes."""

    node_id: str
    full: tuple[tuple[str, int], ...]


RouterNews = Adopted | WorkersExpected | WorkerDraining | WorkerRole | WorkerLost  # events for the router
SupervisorCommand = RouterNews | LaunchProcess[S] | EndProcess | KillProcess | SuspectHost | RefuseHost


class Supervisor(Generic[S]):
    """Owns the processes' states. Each process is eventually reported lost, whatever made it end."""

    def __init__(self, fleet: Fleet, places: Places, make_spec: Callable[[StartWorker], S]) -> None:
        """`make_spec` describes a worker when the fleet wants it; it may wait for a place after that."""
        self.fleet = fleet
        self.places = places
        self.processes: dict[Key, SupervisedProcess[S]] = {}  # oldest first
        self._due: Timetable[Key] = Timetable()  # as the processes' `due_s`
        self.is_adopted = False  # each process of an earlier head has reported, or is given up
        self._make_spec = make_spec
        self._out: list[SupervisorCommand[S]] = []
        self._is_unsettled = False  # the fleet has decided something since `settle` returned nothing

    def expects(self, key: Key) -> bool:
        """Whether a worker that identifies itself by `key` may serve: it was started, and is not to end."""
        process = self.processes.get(key)
        return process is not None and process.is_expected

    def is_serving(self, key: Key) -> bool:
        process = self.processes.get(key)
        return process is not None and process.is_serving

    def next_tick_s(self) -> float | None:
        due = (self._due.next_s(), self.fleet.next_tick_s())
        return min((at_s for at_s in due if at_s is not None), default=None)

    def phase(self, key: Key) -> str:
        """Returns what a process is doing until it serves; empty for one that does, or is unknown."""
        process = self.processes.get(key)
        if process is None:
            return ""
        why = self.places.why_waiting(key) if process.state is ProcessState.WAITING else ""
        return f"waiting: {why}" if why else process.phase

    def handle(self, event: SupervisorEvent[S], now_s: float) -> list[SupervisorCommand[S]]:
        """Returns the commands that `event` leads to, in order of execution; `settle` gives places after
        that."""
        self._out = []
        match event:
            case AdoptProcesses():
                self._adopt(event, now_s)
            case WorkerProgress():
                self._progressed(event, now_s)
            case WorkerReady(info):
                process = self.processes.get((info.worker_id, info.incarnation))
                if process is not None and process.is_expected:
                    if process.launched_s is not None and process.start_s is None:
                        process.start_s = now_s - process.launched_s
                    process.state, process.info = ProcessState.SERVING, info
                    process.phase, process.fraction = "", 1.0
                    self._be_patient((info.worker_id, info.incarnation), None)
                    self._manage(event, now_s)
            case ConnectionLost():
                self._connection_lost(event, now_s)
            case ProcessEnded():
                self._ended(event, now_s)
            case HostFull(worker_id=worker_id, incarnation=incarnation, full=full):
                node_id = self.places.cores.node_of((worker_id, incarnation))
                if node_id is not None:
                    self._out.append(RefuseHost(node_id, full))
            case _:
                if isinstance(event, Apply):
                    self.places.wanted = event.pools
                self._manage(event, now_s)
        self._lose_patience(now_s)
        return self._out

    def settle(self, now_s: float) -> list[SupervisorCommand[S]]:
        """Called repeatedly once everything decided so far is carried out, until it returns nothing: starts
        the next process for which there is room; the others wait."""
        if not self._is_unsettled:
            return []
        self._out = []
        if (found := self.places.next()) is not None:
            key, placement = found
            process = self.processes[key]
            process.state, process.phase = ProcessState.STARTING, "starting a process"
            process.launched_s = now_s
            self._out.append(LaunchProcess(process.spec, placement))
            self._act(self.fleet.handle(WorkerPlaced(*key), now_s), now_s)
            return self._out
        self._is_unsettled = False
        if self.fleet.is_settled and not self.is_adopted and not self._is_one_away:
            self.is_adopted = True
            self._out.append(Adopted())
        self._out.append(WorkersExpected(self.fleet.num_expected))
        return self._out

    def _manage(self, event: FleetEvent, now_s: float) -> None:
        actions = self.fleet.handle(event, now_s)
        self._is_unsettled = True
        # those that return to work first, or requests would end for want of them; then, before workers drain
        # that others are to replace, how many are expected
        self._act([action for action in actions if isinstance(action, AssignRole)], now_s)
        self._out.append(WorkersExpected(self.fleet.num_expected))
        self._act([action for action in actions if not isinstance(action, AssignRole)], now_s)

    def _act(self, actions: list[FleetAction], now_s: float) -> None:
        """Carries out actions one by one, then the fleet's decisions about processes that were only
        waiting."""
        waiting = deque(actions)
        while waiting:
            match waiting.popleft():
                case StartWorker(role, worker_id, incarnation) as action:
                    spec = self._make_spec(action)
                    self.processes[worker_id, incarnation] = SupervisedProcess(spec, now_s)
                    self.places.ask((worker_id, incarnation), role, spec.need)
                case DrainWorker(worker_id):
                    self._out.append(WorkerDraining(worker_id))
                case AssignRole(worker_id, role):
                    self.places.assign(worker_id, role)
                    self._out.append(WorkerRole(worker_id, role))
                case StopWorker(worker_id, incarnation, reason):
                    waiting += self._stop((worker_id, incarnation), reason, now_s)

    def _adopt(self, event: AdoptProcesses[S], now_s: float) -> None:
        newest = {spec.key[0]: spec.key for spec, _ in event.living}
        for spec, placement in event.living:
            self.places.adopt(spec.key, spec.role, placement, spec.need)
            self.processes[spec.key] = SupervisedProcess(
                spec, now_s, ProcessState.STARTING, phase="reconnecting"
            )
        for spec, _ in event.living:
            if newest[spec.key[0]] != spec.key:
                self._stop(spec.key, "replaced", now_s)
        kept = tuple(StartWorker(self.processes[key].spec.role, *key) for key in newest.values())
        self._manage(AdoptWorkers(kept), now_s)

    def _progressed(self, event: WorkerProgress, now_s: float) -> None:
        process = self.processes.get((event.worker_id, event.incarnation))
        if process is not None:
            process.phase, process.fraction = event.phase, event.fraction
            progress = event.phase, event.fraction
            self._manage(WorkerLoading(event.worker_id, event.incarnation, progress), now_s)

    def _connection_lost(self, event: ConnectionLost, now_s: float) -> None:
        """A worker that was to end, or has not begun to serve, is better explained by the end of its process.
        One that fell silent may be frozen, and a new incarnation needs its cores: it is killed, not asked to
        end. One that was away, and whose new connection breaks before it is ready again, is lost as well: the
        router has given it up."""
        key, process = event.key, self.processes.get(event.key)
        if process is None or process.state not in (ProcessState.SERVING, ProcessState.AWAY):
            return
        if event.comes_back:
            process.state, process.num_beats_left = ProcessState.AWAY, NUM_AWAY_BEATS
            self._be_patient(key, now_s + HEARTBEAT_S)
            return
        process.may_have_died = not event.is_silent
        self._lost(key, event.reason, now_s, may_ask=not event.is_silent)

    def _lost(self, key: Key, reason: str, now_s: float, *, may_ask: bool) -> None:
        self._suspect(key)
        self._manage(WorkerLost(*key, reason), now_s)
        self._stop(key, reason, now_s, may_ask=may_ask)

    @property
    def _is_one_away(self) -> bool:
        return any(process.state is ProcessState.AWAY for process in self.processes.values())

    def _ended(self, event: ProcessEnded, now_s: float) -> None:
        key = event.worker_id, event.incarnation
        process = self.processes[key]
        if not event.is_explained and process.is_expected:
            self._suspect(key)
        reason = event.reason if event.is_explained else process.end_reason or event.reason
        has_died = event.has_died and (process.state is not ProcessState.KILLED or process.may_have_died)
        self._forget(key, reason, LossCause.DIED if has_died else LossCause.GONE)
        self._manage(WorkerLost(*key, reason), now_s)

    def _suspect(self, key: Key) -> None:
        node_id = self.places.cores.node_of(key)
        if node_id is not None:
            self._out.append(SuspectHost(node_id))

    def _stop(self, key: Key, reason: str, now_s: float, *, may_ask: bool = True) -> list[FleetAction]:
        """Ends a process, or its wait for a place; returns the fleet's resulting actions."""
        process = self.processes.get(key)
        if process is None or not process.is_expected:
            return []  # its end was reported already, or will be
        process.end_reason = reason
        if process.state is ProcessState.WAITING:
            self._forget(key, reason)
            return self.fleet.handle(WorkerLost(*key, reason), now_s)
        if may_ask:
            process.state = ProcessState.ENDING
            self._be_patient(key, now_s + STOP_TIMEOUT_S)
            self._out.append(EndProcess(key))
        else:
            process.state = ProcessState.KILLED
            self._be_patient(key, None)
            self._out.append(KillProcess(key))
        return []

    def _forget(self, key: Key, reason: str, cause: LossCause = LossCause.GONE) -> None:
        """Forgets a process of which nothing is left: its cores go to waiting ones."""
        self._be_patient(key, None)
        del self.processes[key]
        self.places.give_back(key)
        self._out.append(WorkerLost(*key, reason, cause))

    def _be_patient(self, key: Key, until_s: float | None) -> None:
        self.processes[key].due_s = until_s
        self._due.put(key, until_s)

    def _lose_patience(self, now_s: float) -> None:
        for key in self._due.pop_due(now_s):
            process = self.processes[key]
            if process.state is ProcessState.ENDING:
                if process.due_s is not None and now_s > process.due_s + LATE_S:
                    # we stood still ourselves: it may have ended, and the news waits to be handled
                    self._be_patient(key, now_s + HEARTBEAT_S)
                    continue
                process.state, process.due_s = ProcessState.KILLED, None
                self._out.append(KillProcess(key))
            elif process.num_beats_left > 1:
                process.num_beats_left -= 1
                self._be_patient(key, now_s + HEARTBEAT_S)
            else:
                reason = f"not back after {NUM_AWAY_BEATS * HEARTBEAT_S:.0f} s"
                self._out.append(WorkerLost(*key, reason))
                self._lost(key, reason, now_s, may_ask=False)
