"""The inputs and outputs of the fleet's reconcile loop, which also takes the router's WorkerReady,
WorkerLost, WorkerIdle and Tick."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.messages import Role
from .events import Tick, WorkerIdle, WorkerLost, WorkerReady


@dataclass(frozen=True, slots=True)
class Apply:
    """Sets the pools' sizes. Reverts earlier drains by hand."""

    pools: Mapping[Role, int]
    # open at each worker: the least loaded are removed first
    num_legs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drain:
    """Takes a worker out of service until the next Apply; it is not replaced. Unknown ones are ignored."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Drains and stops everything; `Fleet.is_stopped` reports completion."""


@dataclass(frozen=True, slots=True)
class AdoptWorkers:
    """These workers were started by an earlier controller and are running. Until each has become ready, or is
    found to be loading or lost, nothing is started or stopped to match the pools."""

    workers: tuple["StartWorker", ...]


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    """The worker is still loading. It may take as long as it likes while its `progress`, compared by equality
    alone, changes. Unknown ones are ignored."""

    worker_id: str
    incarnation: int
    progress: object = None


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """The worker has a place on some host and is starting; it may wait for that indefinitely. Unknown ones
    are ignored."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ReplaceWorkers:
    """Drains these workers, given as (worker_id, incarnation), and starts others in their place: their host
    is no longer to be used. Unknown ones are ignored."""

    workers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class HostJoined:
    """A host may take workers from now on, for the first time since its Ray started. Workers that failed may
    have failed with it: none waits for its next start any longer, and their failures are not counted."""


FleetEvent = (
    AdoptWorkers
    | Apply
    | Drain
    | HostJoined
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
    """Starts a process as soon as there is a place for it; answered by WorkerPlaced then, by WorkerReady, and
    by WorkerLost when it ends for any reason."""

    role: Role
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """Gives the worker no new work (the router's WorkerDraining); answered by WorkerIdle."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class AssignRole:
    """Lets the worker serve as `role` from now on, even if it was draining (the router's WorkerRole)."""

    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Ends the process; answered by WorkerLost, with this reason unless the process reports its own."""

    worker_id: str
    incarnation: int
    reason: str = "stopped"


FleetAction = StartWorker | DrainWorker | AssignRole | StopWorker
