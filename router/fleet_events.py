"""What goes into the fleet's reconcile loop and what comes out; beside these it takes the router's
WorkerReady, WorkerLost, WorkerIdle and Tick."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.messages import Role
from .events import Tick, WorkerIdle, WorkerLost, WorkerReady


@dataclass(frozen=True, slots=True)
class Apply:
    """Make the pools have these sizes. Takes back earlier drains by hand."""

    pools: Mapping[Role, int]
    num_legs: Mapping[str, int] = field(
        default_factory=dict
    )  # open at each worker: the least loaded are removed first


@dataclass(frozen=True, slots=True)
class Drain:
    """Take a worker out of service until the next Apply; it is not replaced. Unknown ones are ignored."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Drain and stop everything; `Fleet.is_stopped` tells when it is done."""


@dataclass(frozen=True, slots=True)
class AdoptWorkers:
    """These were started by an earlier controller and live. Until each has become ready, or is found to be
    loading or lost, nothing is started or stopped to match the pools."""

    workers: tuple["StartWorker", ...]


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    """The worker is not ready, but on its way. Unknown ones are ignored."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """The worker has a place on some host, and starts: until then it may wait for as long as it takes.
    Unknown ones are ignored."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ReplaceWorkers:
    """Drain these, as (worker_id, incarnation), and start others in their place: their host is not to be used
    any more. Unknown ones are ignored."""

    workers: tuple[tuple[str, int], ...]


FleetEvent = (
    AdoptWorkers
    | Apply
    | Drain
    | ReplaceWorkers
    | Shutdown
    | WorkerReady
    | WorkerPlaced
    | WorkerLoading
    | WorkerLost
    | WorkerIdle
    | Tick
)


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a process as soon as there is a place for it; answered by WorkerPlaced then, by WorkerReady, and
    by WorkerLost when it ends, whenever and why ever."""

    role: Role
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """Give the worker nothing new (the router's WorkerDraining); answered by WorkerIdle."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class AssignRole:
    """Let the worker serve as `role` from now on, also if it was draining (the router's WorkerRole)."""

    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End the process; answered by WorkerLost, with this reason unless the process has one of its own."""

    worker_id: str
    incarnation: int
    reason: str = "stopped"


FleetAction = StartWorker | DrainWorker | AssignRole | StopWorker
