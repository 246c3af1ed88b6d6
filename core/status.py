"""The cluster as an operator sees it: values that the head assembles and the servers return."""

import enum
from dataclasses import dataclass

from .hosts import HostStatus
from .messages import Role


class WorkerState(enum.Enum):
    """The state of a worker."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker's row. Counts are those of its last report."""

    worker_id: str
    role: Role
    state: WorkerState
    phase: str = ""  # the current phase of a starting worker
    fraction: float = 0.0  # how much of it is done
    message: str = ""  # the last failure
    node: str = ""
    pid: int = 0
    rank_pids: tuple[int, ...] = ()  # of ranks 1, 2, ...
    devices: tuple[str, ...] = ()
    kernels: str = ""  # the kind that it computes with, once it is ready
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    tokens_per_s: float = 0.0
    age_s: float = 0.0
    num_restarts: int = 0
    stalled_s: float = 0.0  # for how long it has had sequences to compute and has ended no step


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The whole cluster at one instant."""

    serving: bool  # requests are accepted
    shutting_down: bool
    num_queued_requests: int
    num_running_requests: int
    instances: dict[Role, int]  # as configured
    workers: tuple[WorkerStatus, ...]
    uptime_s: float
    degraded: str | None = None  # deviation of service from the configuration, as text
    hosts: tuple[HostStatus, ...] = ()
