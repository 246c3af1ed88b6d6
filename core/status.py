"""The cluster as an operator sees it: values that the head puts together and the doors pass on."""

import enum

import msgspec

from .messages import Role


class WorkerState(enum.Enum):
    """What a worker is doing, or why it does nothing."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"  # failed; started again after a while


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `pdserve status`."""

    worker_id: str
    incarnation: int
    role: Role
    state: WorkerState
    message: str = ""  # phase of the start, or the last failure
    progress: float = 0.0  # of the start, 0 to 1
    devices: tuple[str, ...] = ()
    node: str = ""
    pid: int = 0
    kernels: str = ""
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    tokens_per_s: float = 0.0
    age_s: float = 0.0
    num_restarts: int = 0


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How many instances of a role there should be, and how many serve."""

    role: Role
    num_desired: int
    num_ready: int


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `pdserve status` shows."""

    model: str
    ready: bool  # some worker can serve requests
    shutting_down: bool = False
    degraded: str | None = None  # e.g. that one pool stands in for the other
    uptime_s: float = 0.0
    num_queued: int = 0  # requests that wait for a worker
    num_active: int = 0  # requests dispatched and not ended
    num_finished: int = 0
    num_resumed: int = 0
    num_retried: int = 0
    num_expired: int = 0
    pools: tuple[PoolStatus, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()


class ApplyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What an accepted `apply` changed: key paths with their old and new values, in words."""

    changes: tuple[str, ...]
