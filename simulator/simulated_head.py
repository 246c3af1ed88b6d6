"""The head in virtual time: production's `Router` and `Fleet`, inside a simulation of the connections and
processes that `RouterService` and `Controller` handle."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from ..core.errors import PdserveError
from ..core.latency import LatencyModel
from ..core.messages import (
    Abort,
    Heartbeat,
    LegEnded,
    Probe,
    Role,
    WorkerCommand,
)
from ..core.pump import CommandPump
from ..core.request import FinishReason, Request
from ..router.config import RouterConfig
from ..router.core import Router
from ..router.cores import Key, Placement
from ..router.events import (
    Adopted,
    Cancel,
    EmitChoiceEnd,
    EmitEnd,
    EmitTokens,
    RouterCommand,
    RouterEvent,
    SendCommand,
    Submit,
    Tick,
    WorkerAway,
    WorkerIdle,
    WorkerLost,
    WorkerReady,
    WorkerRole,
)
from ..router.fleet import Fleet, FleetConfig
from ..router.fleet_events import Apply, HostJoined, ReplaceWorkers, StartWorker
from ..router.hosts import (
    WATCH_INTERVAL_S,
    CheckHost,
    ExpectHosts,
    HostChanged,
    HostEvent,
    HostRefused,
    Hosts,
    HostsSeen,
    HostSuspected,
    VacateHost,
)
from ..router.places import Places
from ..router.planner_desk import PlannerDesk
from ..router.registered_worker import RoutingState
from ..router.supervisor import (
    GENERATION_STRIDE,
    AdoptProcesses,
    EndProcess,
    KillProcess,
    LaunchProcess,
    ProcessEnded,
    ProcessState,
    RefuseHost,
    Supervisor,
    SupervisorCommand,
    SupervisorEvent,
    SuspectHost,
)
from ..router.worker_sessions import HangUp, Say, SessionCommand, ToRouter, ToSupervisor, WorkerSessions
from .head_checks import HeadChecks
from .network import ConnectionEnd
from .simulated_hosts import SimulatedHosts
from .simulated_worker import InstanceSpec, SimulatedWorker
from .virtual_time import Timer, VirtualProcess, VirtualTime

LINKS_INTERVAL_S = 1.0  # between two checks that every link has been tried
END_S = 0.001  # until a process that is asked to end has ended
TAKE_OVER_S = 0.01  # of the head's loop, for each request
SLICE_S = 0.0002  # of a take-over that adds none


def _spec(action: StartWorker) -> InstanceSpec:
    return InstanceSpec(action.role, action.worker_id, action.incarnation)


class SimulatedStream(Protocol):
    """The receiver of a request's stream."""

    def on_event(self, event: EmitTokens | EmitChoiceEnd | EmitEnd) -> None: ...
    def on_lost(self) -> None: ...


class HeadWorld(Protocol):
    """The surroundings of a simulated head."""

    time: VirtualTime
    hosts: SimulatedHosts
    keeps_timeline: bool
    heard_s: float  # until the end of a process is noticed

    def start_worker(self, spec: InstanceSpec, placement: Placement) -> SimulatedWorker: ...
    def violation(self, text: str) -> None: ...
    def note(self, text: str) -> None:
        """Adds a line to the timeline."""
        ...


class SimulatedHead:
    """Streams on one side, workers on the other, decisions in the middle."""

    def __init__(
        self,
        world: HeadWorld,
        process: VirtualProcess,
        router: RouterConfig,
        fleet: FleetConfig,
        join_timeout_s: float,
        generation: int = 0,
    ) -> None:
        """`generation` counts the heads before this one, whose workers it takes over."""
        self.process = process
        self.router = Router(
            router, LatencyModel(), first_attempt=generation * GENERATION_STRIDE, adopts=generation > 0
        )
        self.fleet = Fleet(fleet, first_incarnation=1 + generation * GENERATION_STRIDE)
        self.places = Places()
        self.hosts = Hosts(self.places)
        self._world = world
        self._join_timeout_s = join_timeout_s
        self._supervisor = Supervisor(self.fleet, self.places, _spec)
        self.desk = PlannerDesk(generation * GENERATION_STRIDE)
        self._is_first = generation == 0
        self.clients: dict[str, SimulatedStream] = {}
        self.on_dispatch: Callable[[], object] = lambda: None
        self._time = world.time
        self._sessions: WorkerSessions[ConnectionEnd] = WorkerSessions(self._supervisor.expects)
        self.checks = HeadChecks(self.router, world.violation, is_first=self._is_first)
        self._started: dict[Key, SimulatedWorker] = {}
        self._commands: CommandPump[RouterCommand] = CommandPump(self._carry_out)
        self._actions: CommandPump[SupervisorCommand[InstanceSpec]] = CommandPump(self._act, self._settle)
        self._tick: Timer | None = None
        self._slice_due_s: float | None = None  # of a take-over; later events do not put it off
        self._fleet_tick: Timer | None = None

    @property
    def is_awake(self) -> bool:
        """Whether it is alive and not frozen."""
        return self.process.is_alive and not self.process.is_frozen

    def start(self, pools: Mapping[Role, int], survivors: Iterable[SimulatedWorker]) -> None:
        """Starts workers to match the pools. `survivors` are processes that an earlier head started, oldest
        first."""
        if self._is_first:
            self._meet_hosts()
        living = list(survivors)
        for worker in living:
            self._watch(worker.spec.key, worker)
        self.manage(AdoptProcesses(tuple((worker.spec, worker.placement) for worker in living)))
        self.manage(Apply(pools))

    # hosts

    def _meet_hosts(self) -> None:
        """Starts following the hosts, once the placement of running workers is known."""
        self.expect_hosts()
        self._look()
        self.process.every(WATCH_INTERVAL_S, self._look)
        self.process.every(LINKS_INTERVAL_S, self._check_links)

    def _look(self) -> None:
        self.host_event(HostsSeen(self._world.hosts.seen()))

    def expect_hosts(self) -> None:
        """Expects the hosts of the configuration in force."""
        self.host_event(ExpectHosts(self._world.hosts.expected(), self._join_timeout_s))

    def host_event(self, event: HostEvent) -> None:
        self._on_host_event(event)
        self.manage(Tick())

    def _on_host_event(self, event: HostEvent) -> None:
        for action in self.hosts.handle(event, self._time.now_s):
            match action:
                case CheckHost(node_id):
                    after_s, answer = self._world.hosts.check(node_id)
                    self.process.call_later(after_s, partial(self.host_event, answer))
                case VacateHost(workers):
                    self.manage(ReplaceWorkers(workers))
                case HostJoined():
                    self.manage(HostJoined())
                case HostChanged(name, _, message):
                    if self._world.keeps_timeline:
                        self._world.note(f"host {name}: {message or 'joined'}")

    # clients

    def submit(self, request: Request, client: SimulatedStream, *, comes_back: bool) -> PdserveError | None:
        """Returns why the request is not admitted; None when it is. A client that comes back has been
        admitted before."""
        if request.request_id in self.clients:
            raise AssertionError("clients do not use an id twice at a time")
        self.clients[request.request_id] = client
        num_displaced = self.router.counters.displaced
        self.checks.submitted(request)
        try:
            self.handle(Submit(request))
        except PdserveError as error:
            del self.clients[request.request_id]
            self.checks.refused(request.request_id)
            return error
        has_displaced = self.router.counters.displaced > num_displaced
        self.checks.admitted(self._time.now_s, comes_back=comes_back or has_displaced)
        return None

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self.handle(
            Cancel(request_id, FinishReason.CANCELLED if choice is None else FinishReason.STOP, choice)
        )

    # the router

    def handle(self, event: RouterEvent) -> None:
        num_live_before = self.router.num_live if self.router.is_adopting else None
        try:
            commands = self.router.handle(event, self._time.now_s)
        except PdserveError:
            raise
        except Exception as error:  # an error that would end the head's process
            self._world.violation(f"the router failed at {type(event).__name__}: {error!r}")
            raise
        num_taken_over = 0 if num_live_before is None else self.router.num_live - num_live_before
        self.checks.took_over(num_taken_over)
        if not self._commands.run(commands):
            return
        cost_s = max(0, num_taken_over) * TAKE_OVER_S
        if cost_s:
            self.process.stand_still(cost_s)
        due_s = self.router.next_tick_s()
        if self.router.is_adopting and due_s is not None:  # a slice at once, but after what else is due
            due_s = self._time.now_s + cost_s + SLICE_S if self._slice_due_s is None else self._slice_due_s
            self._slice_due_s = due_s
        if self._tick is not None:
            self._tick.cancel()
        self._tick = None if due_s is None else self.process.call_at(due_s, self._on_tick)

    def _on_tick(self) -> None:
        self._slice_due_s = None
        self.handle(Tick())

    def _carry_out(self, command: RouterCommand) -> None:
        match command:
            case SendCommand(worker_id, incarnation, message):
                connection = self._sessions.connection((worker_id, incarnation))
                if connection is not None:
                    connection.send(message)
                started = self._started.get((worker_id, incarnation))
                host = None if started is None else started.placement.node_id
                self.checks.sent((worker_id, incarnation), host, message, self._time.now_s)
                if not isinstance(message, Abort | Probe):
                    self.on_dispatch()
                if self._world.keeps_timeline:
                    self._world.note(f"router -> {worker_id}/{incarnation}: {describe(message)}")
            case EmitTokens() | EmitChoiceEnd() | EmitEnd():
                client = self.clients.get(command.request_id)
                if isinstance(command, EmitEnd):
                    self.clients.pop(command.request_id, None)
                    self.checks.ended(command.request_id, self.connected())
                if client is None:
                    self._world.violation(f"{command.request_id}: {type(command).__name__} after its end")
                else:
                    client.on_event(command)
            case WorkerIdle(worker_id, incarnation):
                self.manage(WorkerIdle(worker_id, incarnation))

    def _hosts_that_serve(self) -> set[str]:
        """Returns the hosts on which workers are ready, according to the router."""
        ready = (
            one for one in self.router.status(self._time.now_s).workers if one.state is RoutingState.READY
        )
        started = (self._started.get((one.worker_id, one.incarnation)) for one in ready)
        return {worker.placement.node_id for worker in started if worker is not None}

    def _check_links(self) -> None:
        self.checks.check_links(self._hosts_that_serve(), self._time.now_s)

    # workers' connections

    def accept(self, end: ConnectionEnd) -> None:
        """Accepts a connection to the workers' port."""
        end.on_message = lambda message: self._received(end, message)
        end.on_lost = lambda reason: self._on_session(self._sessions.closed(end, reason, self._time.now_s))
        self._on_session(self._sessions.opened(end, self._time.now_s))
        self.process.call_later(self._sessions.heartbeat_s, lambda: self._beat(end))

    def _received(self, end: ConnectionEnd, message: Any) -> None:
        self._sessions.heard(end)
        self._on_session(self._sessions.received(end, message))

    def _beat(self, end: ConnectionEnd) -> None:
        if end.is_open:
            self._on_session(self._sessions.beat(end, self._time.now_s))
            self.process.call_later(self._sessions.heartbeat_s, lambda: self._beat(end))

    def _on_session(self, commands: Iterable[SessionCommand[ConnectionEnd]]) -> None:
        for command in commands:
            match command:
                case ToRouter(event):
                    self._note_report(event)
                    self.checks.hears(event, self._time.now_s)
                    self.handle(event)
                    if isinstance(event, WorkerReady) and self._supervisor.is_adopted:
                        self.checks.came_back((event.info.worker_id, event.info.incarnation))
                case ToSupervisor(event):
                    self.manage(event)
                case Say(end, message):
                    end.send(message)
                case HangUp(end):
                    end.close()
                    self._on_session(self._sessions.closed(end, None, self._time.now_s))

    def connected(self) -> set[Key]:
        """Returns the workers that are running and reachable."""
        return {key for key in self._started if self._sessions.connection(key) is not None}

    def _note_report(self, event: RouterEvent) -> None:
        match event:
            case WorkerLost(worker_id, incarnation, reason):
                self._world.note(f"router lost {worker_id}/{incarnation}: {reason}")
            case WorkerAway(worker_id, incarnation):
                self._world.note(f"{worker_id}/{incarnation} is away")
            case LegEnded(worker_id=worker_id, incarnation=incarnation, leg=leg):
                how = event.error or "complete"
                self._world.note(f"{worker_id}/{incarnation}: {leg.value} of {event.transfer} ended, {how}")

    # workers' processes

    def manage(self, event: SupervisorEvent[InstanceSpec]) -> None:
        if not self._actions.run(self._supervisor.handle(event, self._time.now_s)):
            return
        if self._fleet_tick is not None:
            self._fleet_tick.cancel()
        due_s = self._supervisor.next_tick_s()
        self._fleet_tick = None if due_s is None else self.process.call_at(due_s, lambda: self.manage(Tick()))

    def _act(self, command: SupervisorCommand[InstanceSpec]) -> None:
        match command:
            case LaunchProcess(spec, placement):
                self._watch(spec.key, self._world.start_worker(spec, placement))
            case EndProcess(key):  # a frozen or unreachable process keeps running
                worker = self._started[key]
                worker.process.call_later(END_S, worker.end)
            case KillProcess(key):
                self._started[key].process.kill()
            case SuspectHost(node_id):
                self._on_host_event(HostSuspected(node_id))
            case RefuseHost(node_id):
                self._on_host_event(HostRefused(node_id, "it is full"))
            case _:
                if isinstance(command, WorkerRole):
                    self._check_role(command)
                self.handle(command)
                if isinstance(command, Adopted) and not self._is_first:
                    self._meet_hosts()

    def _settle(self) -> list[SupervisorCommand[InstanceSpec]]:
        return self._supervisor.settle(self._time.now_s)

    def _check_role(self, command: WorkerRole) -> None:
        """Checks that a worker that is to serve is on a host that may be used."""
        for key, worker in self._started.items():
            if key[0] == command.worker_id and self._supervisor.expects(key):
                self._world.hosts.serves(
                    worker.placement.node_id, f"{command.worker_id} becomes {command.role.value}"
                )

    def waits_for_its_first_place(self, role: Role) -> bool:
        """Whether instances of a pool wait for a place and none has one, as far as the head has heard."""
        processes = self._supervisor.processes.values()
        states = {process.state for process in processes if process.spec.role is role}
        return states == {ProcessState.WAITING}

    def _watch(self, key: Key, worker: SimulatedWorker) -> None:
        self._started[key] = worker
        worker.process.when_it_dies(
            lambda: self.process.call_later(self._world.heard_s, lambda: self._ended(key))
        )

    def _ended(self, key: Key) -> None:
        worker = self._started.pop(key)
        has_died = not worker.has_ended_in_order and self._world.hosts.is_up(worker.placement.node_id)
        self.manage(ProcessEnded(*key, "the process ended", has_died=has_died))


def describe(command: WorkerCommand) -> str:
    """Returns one line of the timeline."""
    name = type(command).__name__
    if isinstance(command, Heartbeat):
        return name
    if isinstance(command, Abort):
        return f"{name} {command.transfer}" + ("" if command.choice is None else f"/{command.choice}")
    if isinstance(command, Probe):
        return f"{name} {command.target.worker_id}/{command.target.incarnation}"
    spec = command.spec
    return f"{name} {spec.transfer}, {spec.num_tokens} tokens, choices {', '.join(map(str, spec.choices))}"
