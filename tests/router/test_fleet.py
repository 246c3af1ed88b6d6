"""The reconcile loop: from desired pools and workers' events to starts, drains, flips and stops."""

import random

import pytest

from pdserve.core.errors import InvalidTransition
from pdserve.router.events import Tick, WorkerIdle, WorkerLost, WorkerReady
from pdserve.router.fleet import FleetConfig
from pdserve.router.fleet_events import (
    AssignRole,
    Drain,
    DrainWorker,
    FleetAction,
    HostJoined,
    ReplaceWorkers,
    Shutdown,
    StartWorker,
    StopWorker,
    WorkerLoading,
    WorkerPlaced,
)
from pdserve.router.fleet_member import TRANSITIONS, Member, MemberState

from .cluster import worker_info
from .fleet_at import D, FleetAt, P


def test_apply_starts_what_is_missing_under_stable_names() -> None:
    fleet = FleetAt()
    assert fleet.apply({P: 1, D: 2}) == [
        StartWorker(D, "worker-0", 1),
        StartWorker(D, "worker-1", 2),
        StartWorker(P, "worker-2", 3),
    ]
    assert fleet.fleet.num_expected == 3
    assert fleet.apply({P: 1, D: 2}) == []


def test_a_lost_worker_is_replaced_at_once_as_a_new_incarnation() -> None:
    fleet = FleetAt(D, P)
    assert fleet.lost("worker-0", after_s=100.0) == [StartWorker(D, "worker-0", 3)]
    assert fleet.handle(WorkerLost("worker-0", 1, "late")) == []


def test_repeated_start_failures_back_off_exponentially_and_keep_their_message() -> None:
    fleet = FleetAt(config=FleetConfig(backoff_s=1.0, max_backoff_s=4.0))
    fleet.apply({D: 1})
    delays = []
    for _ in range(4):
        assert fleet.handle(WorkerLost("worker-0", fleet.incarnation("worker-0"), "no checkpoint")) == []
        (status,) = fleet.fleet.status()
        assert (status.state, status.last_error) == (MemberState.BACKOFF, "no checkpoint")
        due_s = fleet.fleet.next_tick_s()
        assert due_s is not None
        delays.append(due_s - fleet.now_s)
        (action,) = fleet.handle(Tick(), after_s=due_s - fleet.now_s)
        assert isinstance(action, StartWorker)
    assert delays == [1.0, 2.0, 4.0, 4.0]


def test_a_worker_that_failed_starts_at_once_when_a_host_joins() -> None:
    fleet = FleetAt(config=FleetConfig(backoff_s=1.0))
    fleet.apply({D: 1})
    for _ in range(4):
        fleet.lost("worker-0")
        fleet.handle(Tick(), after_s=60.0)
    fleet.lost("worker-0")
    (start,) = fleet.handle(HostJoined(), after_s=1.0)
    assert isinstance(start, StartWorker)
    fleet.lost("worker-0")
    assert fleet.fleet.next_tick_s() == fleet.now_s + 1.0


def test_only_a_worker_that_dies_soon_after_each_start_backs_off() -> None:
    fleet = FleetAt(D, config=FleetConfig(stable_s=30.0))
    assert fleet.lost("worker-0", after_s=1.0) == []
    fleet.handle(Tick(), after_s=1.0)
    fleet.ready("worker-0")
    assert fleet.lost("worker-0", after_s=31.0) == [StartWorker(D, "worker-0", 3)]


def test_a_repeatedly_killed_worker_backs_off_no_longer_than_it_served() -> None:
    fleet = FleetAt(D, config=FleetConfig(stable_s=30.0))
    delays = []
    for _ in range(5):
        assert fleet.lost("worker-0", after_s=3.0) == []
        due_s = fleet.fleet.next_tick_s()
        assert due_s is not None
        delays.append(due_s - fleet.now_s)
        fleet.handle(Tick(), after_s=due_s - fleet.now_s)
        fleet.ready("worker-0")
    assert delays == [1.0, 2.0, 3.0, 3.0, 3.0]


def test_a_start_that_never_completes_is_given_up_and_repeated() -> None:
    fleet = FleetAt(config=FleetConfig(start_timeout_s=10.0))
    fleet.apply({D: 1})
    assert fleet.handle(Tick(), after_s=3600.0) == [], "it has no place yet"
    fleet.handle(WorkerPlaced("worker-0", 1))
    for _ in range(9):
        assert fleet.handle(Tick(), after_s=1.0) == []
    reason = "not ready after 10 s, without any progress for 10 s"
    assert fleet.handle(Tick(), after_s=1.0) == [StopWorker("worker-0", 1, reason)]
    assert fleet.fleet.status()[0].last_error == reason
    assert fleet.handle(WorkerLost("worker-0", 1, "stopped")) == []
    assert fleet.handle(Tick(), after_s=1.0) == [StartWorker(D, "worker-0", 2)]


def test_a_start_that_goes_on_is_never_given_up() -> None:
    fleet = FleetAt(config=FleetConfig(start_timeout_s=10.0))
    fleet.apply({D: 1})
    fleet.handle(WorkerPlaced("worker-0", 1))
    for second in range(100):
        fleet.handle(WorkerLoading("worker-0", 1, ("loading", second // 9)), after_s=1.0)
        assert fleet.handle(Tick()) == []
    for _ in range(9):
        assert fleet.handle(WorkerLoading("worker-0", 1, ("loading", 11)), after_s=1.0) == []
    (stopped,) = fleet.handle(Tick(), after_s=1.0)
    assert isinstance(stopped, StopWorker)


def test_a_pause_of_our_own_does_not_count_towards_a_start() -> None:
    fleet = FleetAt(config=FleetConfig(start_timeout_s=10.0))
    fleet.apply({D: 1})
    fleet.handle(WorkerPlaced("worker-0", 1))
    assert fleet.handle(Tick(), after_s=60.0) == []
    assert fleet.ready("worker-0") == []


def test_scaling_down_drains_the_least_loaded_and_of_equals_the_newest() -> None:
    fleet = FleetAt(D, D, D)
    assert fleet.apply({D: 2}, {"worker-0": 5, "worker-1": 1, "worker-2": 1}) == [DrainWorker("worker-2")]
    assert fleet.apply({D: 1}, {"worker-0": 0, "worker-1": 1}) == [DrainWorker("worker-0")]


def test_a_drained_worker_stops_when_idle_and_leaves_the_fleet() -> None:
    fleet = FleetAt(D, D)
    fleet.apply({D: 1})
    assert fleet.handle(WorkerIdle("worker-1", 2)) == [StopWorker("worker-1", 2)]
    assert fleet.handle(WorkerLost("worker-1", 2, "stopped")) == []
    assert set(fleet.states()) == {"worker-0"}


def test_a_worker_that_does_not_become_idle_stops_after_the_drain_timeout() -> None:
    fleet = FleetAt(D, D, config=FleetConfig(drain_timeout_s=60.0))
    fleet.apply({D: 1})
    assert fleet.handle(Tick(), after_s=59.0) == []
    assert fleet.handle(Tick(), after_s=1.0) == [StopWorker("worker-1", 2)]


def test_a_worker_lost_while_draining_is_not_replaced() -> None:
    fleet = FleetAt(D, D)
    fleet.apply({D: 1})
    assert fleet.lost("worker-1") == []
    assert set(fleet.states()) == {"worker-0"}


def test_scaling_down_takes_idle_workers_first() -> None:
    fleet = FleetAt(D)
    fleet.apply({D: 3})
    assert fleet.handle(WorkerLost("worker-1", 2, "out of memory")) == []
    assert fleet.apply({D: 2}) == []
    assert set(fleet.states()) == {"worker-0", "worker-2"}
    assert fleet.apply({D: 1}) == [StopWorker("worker-2", 3)]


def test_a_pool_that_grows_takes_the_worker_of_one_that_shrinks() -> None:
    fleet = FleetAt(D, P, P)
    assert fleet.apply({P: 1, D: 2}) == [AssignRole("worker-2", D)]
    assert fleet.states()["worker-2"] == (D, MemberState.READY)
    assert fleet.apply({P: 2, D: 2}) == [StartWorker(P, "worker-3", 4)]


def test_roles_do_not_flip_between_dissimilar_pools() -> None:
    fleet = FleetAt(D, P, P, config=FleetConfig(can_flip=False))
    assert fleet.apply({P: 1, D: 2}) == [StartWorker(D, "worker-3", 4), DrainWorker("worker-2")]


def test_a_worker_still_draining_is_taken_back_when_the_pool_grows_again() -> None:
    fleet = FleetAt(D, D)
    fleet.apply({D: 1})
    assert fleet.apply({D: 2}) == [AssignRole("worker-1", D)]
    assert fleet.states()["worker-1"] == (D, MemberState.READY)


def test_a_worker_drained_by_hand_stays_out_until_the_next_apply() -> None:
    fleet = FleetAt(D, D)
    assert fleet.handle(Drain("worker-0")) == [DrainWorker("worker-0")]
    assert fleet.handle(WorkerIdle("worker-0", 1)) == [StopWorker("worker-0", 1)]
    assert fleet.handle(WorkerLost("worker-0", 1, "stopped")) == []
    assert fleet.states()["worker-0"] == (D, MemberState.DRAINED)
    assert fleet.fleet.num_expected == 0
    assert fleet.apply({D: 2}) == [StartWorker(D, "worker-0", 3)]


@pytest.mark.parametrize("worker_id", ["unknown", "worker-1"])
def test_draining_an_unknown_or_leaving_worker_changes_nothing(worker_id: str) -> None:
    fleet = FleetAt(D, D)
    fleet.apply({D: 1})
    assert fleet.handle(Drain(worker_id)) == []


def test_shutdown_drains_all_and_is_done_when_the_last_process_is_gone() -> None:
    fleet = FleetAt(D, P)
    fleet.apply({P: 2, D: 1})
    actions = fleet.handle(Shutdown())
    assert set(actions) == {DrainWorker("worker-0"), DrainWorker("worker-1"), StopWorker("worker-2", 3)}
    fleet.handle(WorkerIdle("worker-1", fleet.incarnation("worker-1")))
    fleet.handle(WorkerLost("worker-1", fleet.incarnation("worker-1"), "stopped"))
    fleet.handle(WorkerLost("worker-2", 3, "stopped"))
    assert not fleet.fleet.is_stopped
    fleet.lost("worker-0")
    assert fleet.fleet.is_stopped
    assert fleet.apply({D: 5}) == []


def test_an_illegal_transition_raises_with_the_members_history() -> None:
    member = Member("worker-0", D, 1, 0.0)
    member.enter(MemberState.READY, 0.0)
    with pytest.raises(InvalidTransition, match=r"worker-0.*READY -> .*STARTING"):
        member.enter(MemberState.STARTING, 0.0)
    assert set(TRANSITIONS) == set(MemberState)


@pytest.mark.parametrize("seed", range(30))
def test_pools_always_converge_to_the_last_applied_sizes(seed: int) -> None:
    rng = random.Random(seed)
    fleet = FleetAt(config=FleetConfig(can_flip=rng.random() < 0.5))
    processes: dict[str, int] = {}
    draining: set[str] = set()

    def carry_out(actions: list[FleetAction]) -> None:
        for action in actions:
            match action:
                case StartWorker(_, worker_id, incarnation):
                    assert incarnation > processes.get(worker_id, 0)
                    processes[worker_id] = incarnation
                case DrainWorker(worker_id):
                    draining.add(worker_id)
                case AssignRole(worker_id, _):
                    draining.discard(worker_id)
                case StopWorker():
                    pass

    def report(what: str, worker_id: str) -> None:
        state, incarnation = fleet.states().get(worker_id, (None, None))[1], processes[worker_id]
        if what == "ready" and state is MemberState.STARTING:
            carry_out(fleet.handle(WorkerReady(worker_info(worker_id, P, incarnation=incarnation))))
        elif what == "idle" and state is MemberState.DRAINING:
            carry_out(fleet.handle(WorkerIdle(worker_id, incarnation)))
        elif what == "stopped" and state is MemberState.STOPPING:
            carry_out(fleet.handle(WorkerLost(worker_id, incarnation, "stopped")))
        elif what == "lost":
            carry_out(fleet.handle(WorkerLost(worker_id, incarnation, "killed")))

    for _ in range(300):
        what = rng.choice(["apply", "drain", "tick", "ready", "ready", "ready", "idle", "stopped", "lost"])
        if what == "apply":
            carry_out(fleet.apply({P: rng.randint(0, 3), D: rng.randint(0, 3)}))
        elif what == "tick":
            carry_out(fleet.handle(Tick(), after_s=rng.uniform(0.0, 100.0)))
        elif processes:
            worker_id = rng.choice(sorted(processes))
            carry_out(fleet.handle(Drain(worker_id))) if what == "drain" else report(what, worker_id)
    desired = {P: rng.randint(0, 3), D: rng.randint(0, 3)}
    carry_out(fleet.apply(desired))
    for _ in range(20):
        carry_out(fleet.handle(Tick(), after_s=61.0))
        for worker_id in sorted(processes):
            for what in ("ready", "idle", "stopped"):
                report(what, worker_id)
    states = list(fleet.states().values())
    assert {role: states.count((role, MemberState.READY)) for role in (P, D)} == desired
    assert len(states) == sum(desired.values())


def test_workers_of_a_vacated_host_drain_while_replacements_start() -> None:
    fleet = FleetAt(D, D)
    moved = fleet.handle(ReplaceWorkers((("worker-1", 2), ("worker-0", 99))))
    assert moved == [DrainWorker("worker-1"), StartWorker(D, "worker-2", 3)]
    assert fleet.handle(WorkerIdle("worker-1", 2)) == [StopWorker("worker-1", 2)]
    assert fleet.handle(WorkerLost("worker-1", 2, "stopped")) == []


def test_a_growing_pool_does_not_recall_a_worker_leaving_its_host() -> None:
    fleet = FleetAt(D)
    fleet.handle(ReplaceWorkers((("worker-0", 1),)))
    assert fleet.apply({D: 2}) == [StartWorker(D, "worker-2", 3)]
