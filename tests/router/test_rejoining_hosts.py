"""Hosts that fail and rejoin at any moment, under Ray's late view and checks that are answered late or twice:
in the end all instances serve."""

from dataclasses import dataclass, field

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pdserve.core.hosts import ExpectedHosts, HostState
from pdserve.core.messages import Role
from pdserve.core.needs import Need
from pdserve.router.cores import Capacity, Key
from pdserve.router.events import Tick, WorkerReady
from pdserve.router.fleet import Fleet, FleetConfig
from pdserve.router.fleet_events import Apply, HostJoined, StartWorker
from pdserve.router.hosts import (
    CheckHost,
    ExpectHosts,
    HostChecked,
    HostEvent,
    HostRefused,
    Hosts,
    HostsSeen,
    HostSuspected,
    SeenHost,
)
from pdserve.router.places import Places
from pdserve.router.supervisor import (
    ConnectionLost,
    EndProcess,
    KillProcess,
    LaunchProcess,
    ProcessEnded,
    Supervisor,
    SupervisorEvent,
    SuspectHost,
)

from .cluster import worker_info
from .test_supervisor import Spec

P, D = Role.PREFILL, Role.DECODE
WANTED = {P: 1, D: 3}  # on two cores at each of two hosts
NAMES = ("a", "b")
CAPACITY = Capacity(2)


@dataclass
class Process:
    """A worker's process, and what the head has yet to hear about it."""

    spec: Spec
    node_id: str
    is_alive: bool = True
    is_connected: bool = False
    unheard: list[SupervisorEvent[Spec]] = field(default_factory=list)

    def die(self) -> None:
        if self.is_alive:
            self.is_alive = False
            if self.is_connected:
                self.unheard.append(ConnectionLost(*self.spec.key, "connection closed"))
            self.unheard.append(ProcessEnded(*self.spec.key, "its host has gone"))


def make_spec(action: StartWorker) -> Spec:
    return Spec((action.worker_id, action.incarnation), action.role, Need(1, 1.0))


class RejoiningHosts(RuleBasedStateMachine):
    """Two hosts and a head that watches them, as `head.controller` and `head.host_watch` wire it."""

    @initialize()
    def start(self) -> None:
        self.now_s = 0.0
        self.num_joins = 0
        self.up: dict[str, str] = {}  # name -> node id
        self.listed: dict[str, str] = {}  # node id -> name; Ray strikes a dead one off later
        self.reported: set[str] = set()  # as the head has seen it last
        self.unanswered: list[str] = []  # node ids
        self.processes: dict[Key, Process] = {}
        places = Places()
        self.hosts = Hosts(places)
        self.supervisor = Supervisor(Fleet(FleetConfig()), places, make_spec)
        self.watch(ExpectHosts(ExpectedHosts(NAMES), 60.0))
        self.supervise(Apply(WANTED))
        for name in NAMES:
            self.join(name)

    def watch(self, event: HostEvent, *, and_place: bool = True) -> None:
        for action in self.hosts.handle(event, self.now_s):
            if isinstance(action, CheckHost):
                self.unanswered.append(action.node_id)
            elif isinstance(action, HostJoined):
                self.supervise(action)
        if and_place:
            self.supervise(Tick())

    def supervise(self, event: SupervisorEvent[Spec]) -> None:
        commands = self.supervisor.handle(event, self.now_s)
        while commands:
            for command in commands:
                match command:
                    case LaunchProcess(spec, placement):
                        assert placement.node_id in self.reported, "Ray has declared it dead"
                        process = self.processes[spec.key] = Process(spec, placement.node_id)
                        if placement.node_id not in self.up.values():
                            process.die()
                    case KillProcess(key) | EndProcess(key):
                        self.processes[key].die()
                    case SuspectHost(node_id):
                        self.watch(HostSuspected(node_id), and_place=False)
            commands = self.supervisor.settle(self.now_s)

    @rule(name=st.sampled_from(NAMES))
    def fail(self, name: str) -> None:
        node_id = self.up.pop(name, None)
        for process in self.processes.values():
            if process.node_id == node_id:
                process.die()

    @precondition(lambda self: any(process.is_alive for process in self.processes.values()))
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        living = [process for process in self.processes.values() if process.is_alive]
        data.draw(st.sampled_from(living)).die()

    @rule(name=st.sampled_from(NAMES))
    def join(self, name: str) -> None:
        """Under a new node id, which Ray may list beside the last one."""
        if name not in self.up:
            self.num_joins += 1
            self.up[name] = f"{name}.{self.num_joins}"
            self.listed[self.up[name]] = name

    @rule()
    def look(self) -> None:
        self.reported = set(self.listed)
        self.watch(HostsSeen(tuple(SeenHost(node_id, name, name) for node_id, name in self.listed.items())))

    @rule(name=st.sampled_from(NAMES))
    def notice(self, name: str) -> None:
        """Ray strikes the dead nodes of a host off its list."""
        self.listed = {
            node_id: other
            for node_id, other in self.listed.items()
            if other != name or node_id in self.up.values()
        }

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data(), is_transient=st.booleans(), is_repeated=st.booleans())
    def answer(self, data: st.DataObject, is_transient: bool, is_repeated: bool) -> None:
        node_id = data.draw(st.sampled_from(self.unanswered))
        if not is_repeated:
            self.unanswered.remove(node_id)
        is_well = node_id in self.up.values() and not is_transient
        self.watch(HostChecked(node_id, CAPACITY, "" if is_well else "it has not answered"))

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def fill_up(self, data: st.DataObject) -> None:
        self.watch(HostRefused(data.draw(st.sampled_from(sorted(self.up.values()))), "no space is left"))

    @precondition(lambda self: any(process.unheard for process in self.processes.values()))
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        """In any order: the end of a process may be reported before that of its connection."""
        unheard = [process for process in self.processes.values() if process.unheard]
        process = data.draw(st.sampled_from(unheard))
        event = process.unheard.pop(data.draw(st.integers(0, len(process.unheard) - 1)))
        self.supervise(event)

    @precondition(lambda self: any(one.is_alive and not one.is_connected for one in self.processes.values()))
    @rule(data=st.data())
    def be_ready(self, data: st.DataObject) -> None:
        starting = [one for one in self.processes.values() if one.is_alive and not one.is_connected]
        self.connect(data.draw(st.sampled_from(starting)))

    def connect(self, process: Process) -> None:
        process.is_connected = True
        worker_id, incarnation = process.spec.key
        if self.supervisor.expects(process.spec.key):
            info = worker_info(worker_id, process.spec.role, incarnation=incarnation)
            self.supervise(WorkerReady(info))

    @rule(after_s=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def wait(self, after_s: float) -> None:
        self.now_s += after_s
        self.supervise(Tick())
        self.watch(Tick())

    @rule(after_s=st.sampled_from([1.0, 100.0]))
    def settle(self, after_s: float) -> None:
        """All that is pending arrives."""
        self.look()
        while self.unanswered:
            node_id = self.unanswered.pop()
            self.watch(HostChecked(node_id, CAPACITY, "" if node_id in self.up.values() else "it has left"))
        for process in list(self.processes.values()):
            while process.unheard:
                self.supervise(process.unheard.pop(0))
            if process.is_alive and not process.is_connected:
                self.connect(process)
        self.wait(after_s)

    def teardown(self) -> None:
        """Both hosts are there for good: every instance serves."""
        if not hasattr(self, "now_s"):
            return
        for name in NAMES:
            self.join(name)
            self.notice(name)
        for _ in range(20):
            self.settle(100.0)
        rows = self.hosts.status(self.now_s)
        assert {row.address: row.state for row in rows} == dict.fromkeys(NAMES, HostState.JOINED)
        serving = [process for process in self.supervisor.processes.values() if process.is_serving]
        assert len(serving) == len(self.supervisor.processes) == sum(WANTED.values())
        assert all(row.num_cores_taken == 2 for row in rows)


TestRejoiningHosts = RejoiningHosts.TestCase
TestRejoiningHosts.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
