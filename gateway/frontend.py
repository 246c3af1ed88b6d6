"""What the gateway asks of the cluster behind it: to carry out requests, and to tell and change its state.

The only way from here to the router and the workers. The cluster implements it; tests put a small one of their own here.
"""

import enum
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.config import ClusterConfig
from ..core.messages import Role
from ..core.request import Request
from ..router.events import EmitChoiceEnd, EmitEnd, EmitTokens

StreamEvent = EmitTokens | EmitChoiceEnd | EmitEnd


class WorkerState(enum.Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker's row. Counts are those of its last report."""

    worker_id: str
    role: Role
    state: WorkerState
    phase: str = ""  # what a starting worker is doing
    fraction: float = 0.0  # how much of it is done
    message: str = ""  # the last failure
    node: str = ""
    pid: int = 0
    devices: tuple[str, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    tokens_per_s: float = 0.0
    age_s: float = 0.0
    num_restarts: int = 0


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
    degraded: str | None = None  # what is served otherwise than configured, in words


class Frontend(Protocol):
    """All calls come on one asyncio loop."""

    def generate(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The request's stream, ended by one EmitEnd. Closing the iterator cancels the request.

        Raises QueueFull, DuplicateRequest or NoWorkerAvailable before the first event.
        """
        ...

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it because its stop string was found."""
        ...

    def status(self) -> ClusterStatus: ...

    def watch(self) -> AsyncGenerator[ClusterStatus, None]:
        """The state now and after each change, a few times a second at most; ends when the cluster shuts down."""
        ...

    async def apply(self, config: ClusterConfig, dry_run: bool) -> Sequence[str]:
        """Make the cluster match `config`; what is being done about it, a line each. With `dry_run`, what would be.

        `config` differs from the one in force only in keys that may change while it runs. Raises CapacityError.
        """
        ...

    async def drain(self, worker_ids: Sequence[str], shutdown: bool) -> None:
        """Give no more work to these workers, or to any if none is named; returns when they are idle, or after
        `drain_timeout_s`. With `shutdown`, the cluster ends after that.

        Raises InvalidRequest when a name is unknown.
        """
        ...
