"""A new controller's fleet takes over the workers of the one before."""

from pdserve.router.events import Tick, WorkerIdle
from pdserve.router.fleet import Fleet, FleetConfig
from pdserve.router.fleet_events import (
    AdoptWorkers,
    Drain,
    DrainWorker,
    StartWorker,
    StopWorker,
    WorkerLoading,
)
from pdserve.router.fleet_member import MemberState

from .fleet_at import D, FleetAt, P


def adopting(*workers: StartWorker) -> FleetAt:
    """Returns the fleet of a new controller, which knows the workers that its predecessor started."""
    fleet = FleetAt()
    fleet.fleet = Fleet(FleetConfig(start_timeout_s=600.0), first_incarnation=1000)
    assert fleet.handle(AdoptWorkers(workers)) == []
    return fleet


def test_no_worker_starts_before_each_adopted_one_has_reported() -> None:
    fleet = adopting(StartWorker(P, "worker-1", 1), StartWorker(D, "worker-0", 2))
    assert fleet.apply({P: 1, D: 2}) == fleet.ready("worker-1") == []
    assert fleet.ready("worker-0") == [StartWorker(D, "worker-2", 1000)]


def test_an_adopted_worker_that_does_not_report_is_replaced() -> None:
    fleet = adopting(StartWorker(P, "worker-1", 1), StartWorker(D, "worker-0", 2))
    fleet.apply({P: 1, D: 1})
    fleet.ready("worker-1")
    for beat in range(1, 6):
        assert fleet.fleet.next_tick_s() == 0.5 * beat
        assert fleet.handle(Tick(), after_s=0.5) == []
    assert fleet.handle(Tick(), after_s=0.5) == [StopWorker("worker-0", 2, "not reconnected after 3 s")]
    assert fleet.handle(Tick(), after_s=1.0) == [StartWorker(D, "worker-0", 1000)]


def test_a_pause_of_the_controller_is_not_mistaken_for_workers_silence() -> None:
    fleet = adopting(StartWorker(P, "worker-1", 1), StartWorker(D, "worker-0", 2))
    fleet.apply({P: 1, D: 1})
    assert fleet.handle(Tick(), after_s=60.0) == []  # its timer is due before it reads workers' messages
    assert fleet.ready("worker-1") == fleet.ready("worker-0") == []
    assert {state for _, state in fleet.states().values()} == {MemberState.READY}


def test_a_loading_adopted_worker_gets_the_start_timeout_and_delays_nothing() -> None:
    fleet = adopting(StartWorker(D, "worker-0", 1))
    fleet.apply({D: 2})
    assert fleet.handle(WorkerLoading("worker-0", 1)) == [StartWorker(D, "worker-1", 1000)]
    assert fleet.handle(Tick(), after_s=500.0) == []


def test_a_worker_drained_during_adoption_does_not_rejoin_a_shrunk_pool() -> None:
    fleet = adopting(
        StartWorker(D, "worker-0", 1), StartWorker(D, "worker-1", 2), StartWorker(P, "worker-2", 3)
    )
    fleet.apply({D: 1, P: 1})
    fleet.ready("worker-0"), fleet.ready("worker-1")
    assert fleet.handle(Drain("worker-1")) == [DrainWorker("worker-1")]
    fleet.handle(WorkerIdle("worker-1", 2))
    fleet.lost("worker-1")
    assert fleet.ready("worker-2") == []
    assert fleet.states() == {"worker-0": (D, MemberState.READY), "worker-2": (P, MemberState.READY)}
