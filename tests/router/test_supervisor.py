"""The supervisor's decisions: places, timeouts, and suspected hosts, without a clock or a process."""

from dataclasses import dataclass

import pytest

from pdserve.core.messages import HostFull, Role
from pdserve.core.needs import Need
from pdserve.router.cores import Capacity, CoreAllocator, Placement
from pdserve.router.events import Adopted, LossCause, Tick, WorkerLost, WorkerReady, WorkersExpected
from pdserve.router.fleet import Fleet, FleetConfig
from pdserve.router.fleet_events import Apply, Drain, Shutdown, StartWorker
from pdserve.router.fleet_member import MemberState
from pdserve.router.places import Places
from pdserve.router.supervisor import (
    NUM_AWAY_BEATS,
    STOP_TIMEOUT_S,
    AdoptProcesses,
    ConnectionLost,
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
    WorkerProgress,
)

from .cluster import worker_info

P, D = Role.PREFILL, Role.DECODE


@dataclass(frozen=True)
class Spec:
    key: tuple[str, int]
    role: Role
    need: Need


def make_spec(action: StartWorker) -> Spec:
    return Spec((action.worker_id, action.incarnation), action.role, Need(1, 1.0))


class World:
    """A supervisor over one host; time stands still unless a test advances it."""

    def __init__(self, num_cores: int = 2) -> None:
        self.now_s = 0.0
        self.supervisor = Supervisor(
            Fleet(FleetConfig(stable_s=0.0)), Places(CoreAllocator({"node": Capacity(num_cores)})), make_spec
        )

    def handle(self, event: SupervisorEvent[Spec]) -> list[SupervisorCommand[Spec]]:
        commands = self.supervisor.handle(event, self.now_s)
        while more := self.supervisor.settle(self.now_s):
            commands = commands + more
        return commands

    def up(self) -> None:
        """worker-1 is incarnation 2, worker-0 is incarnation 1."""
        self.handle(Apply({P: 1, D: 1}))
        for name, role, incarnation in (("worker-0", D, 1), ("worker-1", P, 2)):
            self.handle(WorkerReady(worker_info(name, role, incarnation=incarnation)))

    def state(self, *key: object) -> ProcessState:
        return self.supervisor.processes[key].state  # type: ignore[index]


def news_left_out(commands: list[SupervisorCommand[Spec]]) -> list[SupervisorCommand[Spec]]:
    return [command for command in commands if not isinstance(command, WorkersExpected | Adopted)]


def test_the_router_learns_expected_workers_before_and_after_each_command() -> None:
    commands = World().handle(Apply({P: 1, D: 1}))
    assert commands[0] == commands[-1] == WorkersExpected(2)
    assert [c.spec.key for c in commands if isinstance(c, LaunchProcess)] == [
        ("worker-0", 1),
        ("worker-1", 2),
    ]


def test_a_process_waits_for_a_place_until_another_is_gone() -> None:
    world = World(num_cores=1)
    world.handle(Apply({P: 1, D: 1}))
    assert world.state("worker-1", 2) is ProcessState.WAITING
    assert world.supervisor.phase(("worker-1", 2)).startswith("waiting: worker-1 needs 1 core(s)")
    world.handle(ProcessEnded("worker-0", 1, "it failed", is_explained=True))
    assert world.state("worker-1", 2) is ProcessState.STARTING


def test_a_process_that_was_only_waiting_is_gone_at_once() -> None:
    world = World(num_cores=1)
    world.handle(Apply({P: 1, D: 1}))
    commands = news_left_out(world.handle(Shutdown()))
    assert commands == [EndProcess(("worker-0", 1)), WorkerLost("worker-1", 2, "stopped")]
    assert list(world.supervisor.processes) == [("worker-0", 1)]


def test_a_process_that_does_not_end_in_time_is_killed_once() -> None:
    world = World()
    world.up()
    assert EndProcess(("worker-0", 1)) in world.handle(
        ConnectionLost("worker-0", 1, "reset", is_silent=False)
    )
    world.now_s = STOP_TIMEOUT_S - 0.01
    assert world.supervisor.processes["worker-0", 1].due_s == STOP_TIMEOUT_S
    assert KillProcess(("worker-0", 1)) not in world.handle(Tick())
    world.now_s = STOP_TIMEOUT_S
    assert KillProcess(("worker-0", 1)) in world.handle(Tick())
    assert world.state("worker-0", 1) is ProcessState.KILLED
    assert KillProcess(("worker-0", 1)) not in world.handle(Tick())


def test_a_process_that_ended_while_the_head_stood_still_has_died() -> None:
    world = World()
    world.up()
    world.handle(ConnectionLost("worker-0", 1, "reset", is_silent=False))
    world.now_s = 10 * STOP_TIMEOUT_S
    assert KillProcess(("worker-0", 1)) not in world.handle(Tick())
    commands = world.handle(ProcessEnded("worker-0", 1, "SIGSEGV", has_died=True))
    assert WorkerLost("worker-0", 1, "reset", LossCause.DIED) in commands


def test_a_silent_worker_is_killed_without_being_asked() -> None:
    world = World()
    world.up()
    commands = world.handle(ConnectionLost("worker-0", 1, "silent", is_silent=True))
    assert KillProcess(("worker-0", 1)) in commands and EndProcess(("worker-0", 1)) not in commands


def test_a_host_is_suspected_before_another_process_gets_a_place() -> None:
    world = World(num_cores=3)
    world.up()
    commands = world.handle(ConnectionLost("worker-0", 1, "reset", is_silent=False))
    (launch,) = (command for command in commands if isinstance(command, LaunchProcess))
    assert commands.index(SuspectHost("node")) < commands.index(launch)


def test_a_full_host_is_the_one_of_the_reporting_worker() -> None:
    world = World()
    world.up()
    full = (("/dev/shm", 64 << 20),)
    report = HostFull(worker_id="worker-0", incarnation=1, full=full)
    assert world.handle(report) == [RefuseHost("node", full)]
    world.handle(ProcessEnded("worker-0", 1, "killed"))
    assert world.handle(report) == []


def test_an_explained_or_requested_end_raises_no_suspicion() -> None:
    world = World()
    world.up()
    world.handle(Drain("worker-1"))
    assert SuspectHost("node") not in world.handle(
        ProcessEnded("worker-0", 1, "layer 3 is gone", is_explained=True)
    )
    world.handle(ConnectionLost("worker-1", 2, "reset", is_silent=True))
    assert SuspectHost("node") not in world.handle(ProcessEnded("worker-1", 2, "killed"))


def test_cores_are_reassigned_only_when_the_process_is_gone() -> None:
    world = World()
    world.up()
    world.handle(ConnectionLost("worker-0", 1, "silent", is_silent=True))
    assert world.state("worker-0", 3) is ProcessState.WAITING
    commands = world.handle(ProcessEnded("worker-0", 1, "killed"))
    assert commands[0] == WorkerLost("worker-0", 1, "silent")
    assert world.state("worker-0", 3) is ProcessState.STARTING


def test_a_process_that_is_to_end_is_not_expected_to_connect() -> None:
    world = World()
    world.handle(Apply({P: 1, D: 1}))
    assert world.supervisor.expects(("worker-0", 1))
    world.handle(Shutdown())
    assert not world.supervisor.expects(("worker-0", 1))
    world.handle(WorkerReady(worker_info("worker-0", D, incarnation=1)))
    assert world.state("worker-0", 1) is ProcessState.ENDING


def test_take_over_keeps_only_the_newest_process_of_a_name() -> None:
    world = World(num_cores=3)
    living = [Spec(key, D, Need(1, 1.0)) for key in (("worker-0", 1), ("worker-0", 4))]
    placed = tuple((spec, Placement("node", (position,))) for position, spec in enumerate(living))
    commands = world.handle(AdoptProcesses(placed))
    assert EndProcess(("worker-0", 1)) in commands and EndProcess(("worker-0", 4)) not in commands
    assert Adopted() not in commands
    world.handle(Apply({D: 1}))
    assert world.supervisor.processes["worker-0", 4].phase == "reconnecting"
    assert Adopted() in world.handle(WorkerProgress("worker-0", 4, "loading weights", 0.5))
    (member,) = world.supervisor.fleet.status()
    assert (member.incarnation, member.state) == (4, MemberState.STARTING)


def test_a_worker_that_is_away_keeps_its_place_until_it_is_back() -> None:
    world = World()
    world.up()
    assert world.handle(ConnectionLost("worker-0", 1, "reset", comes_back=True)) == []
    assert world.state("worker-0", 1) is ProcessState.AWAY and world.supervisor.expects(("worker-0", 1))
    world.now_s = 60.0  # we stand still again: its message waits
    assert news_left_out(world.handle(Tick())) == []
    world.handle(WorkerReady(worker_info("worker-0", D, incarnation=1)))
    assert world.state("worker-0", 1) is ProcessState.SERVING
    assert world.supervisor.next_tick_s() is None


def test_a_worker_that_stays_away_is_lost_and_killed() -> None:
    world = World()
    world.up()
    world.handle(ConnectionLost("worker-0", 1, "reset", comes_back=True))
    for _ in range(NUM_AWAY_BEATS - 1):
        world.now_s += 0.5
        assert news_left_out(world.handle(Tick())) == []
    world.now_s += 0.5
    commands = world.handle(Tick())
    assert WorkerLost("worker-0", 1, "not back after 3 s") in commands
    assert KillProcess(("worker-0", 1)) in commands


def test_a_worker_whose_connection_breaks_before_it_is_back_is_lost() -> None:
    """The router has given it up by then, and takes this incarnation no more."""
    world = World()
    world.up()
    world.handle(ConnectionLost("worker-0", 1, "reset", comes_back=True))
    commands = world.handle(ConnectionLost("worker-0", 1, "frame 5 came, 6 was due"))
    assert EndProcess(("worker-0", 1)) in commands
    assert not world.supervisor.expects(("worker-0", 1))


def test_a_process_that_ends_while_it_is_away_is_lost_at_once() -> None:
    world = World()
    world.up()
    world.handle(ConnectionLost("worker-0", 1, "reset", comes_back=True))
    assert WorkerLost("worker-0", 1, "killed") in world.handle(ProcessEnded("worker-0", 1, "killed"))


@pytest.mark.parametrize(
    ("has_died", "is_silent", "cause"),
    [(True, False, LossCause.DIED), (False, False, LossCause.GONE), (True, True, LossCause.GONE)],
)
def test_the_router_learns_whether_a_process_died_by_itself(
    has_died: bool, is_silent: bool, cause: LossCause
) -> None:
    """One that fell silent is killed by us."""
    world = World()
    world.up()
    world.handle(ConnectionLost("worker-0", 1, "reset", is_silent=is_silent))
    commands = world.handle(ProcessEnded("worker-0", 1, "SIGKILL", has_died=has_died))
    assert WorkerLost("worker-0", 1, "reset", cause) in commands
