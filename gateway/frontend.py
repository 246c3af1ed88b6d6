"""The interface through which the gateway reaches the cluster: to carry out requests, and to report and
change its state.

It is the only path from the gateway to the router and the workers. The cluster implements it; tests implement
small test doubles."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from ..core.config import ClusterConfig
from ..core.request import Request
from ..core.status import ClusterStatus, WorkerState, WorkerStatus
from ..router.events import EmitChoiceEnd, EmitEnd, EmitTokens, Timeline
from ..router.planner_desk import PlannerState

__all__ = ["ClusterStatus", "Frontend", "StreamEvent", "WorkerState", "WorkerStatus"]

StreamEvent = EmitTokens | EmitChoiceEnd | EmitEnd


class Frontend(Protocol):
    """All calls are made on one asyncio loop."""

    def generate(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Streams the request's events, ended by one EmitEnd. Closing the iterator cancels the request.

        Raises Overloaded, DuplicateRequest or NoWorkerAvailable before the first event.
        """
        ...

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice of it because its stop string was found."""
        ...

    def status(self) -> ClusterStatus: ...

    def watch(self) -> AsyncGenerator[ClusterStatus, None]:
        """Yields the state now and after each change, at most a few times a second; ends when the cluster
        shuts down."""
        ...

    def metrics(self) -> bytes:
        """Returns all metrics in the Prometheus text format (Content-Type: text/plain; version=0.0.4;
        charset=utf-8)."""
        ...

    def explain(self, request_id: str) -> Timeline | None:
        """Returns the time account of a running or recently ended request; None if it is not known (any
        more)."""
        ...

    def latest(self, max_requests: int, scope: str) -> list[Timeline]:
        """Returns the time accounts of requests whose ids begin with `scope`: of running ones, newest first,
        then of those that ended last."""
        ...

    async def apply(self, config: ClusterConfig, dry_run: bool) -> object:
        """Starts to reconcile the cluster with `config`; with `dry_run`, only checks that this is possible.

        `config` differs from the one in force only in keys that may change at run time. Raises
        CapacityError."""
        ...

    def planner(self) -> PlannerState:
        """Returns what the planner sees, predicts and did."""
        ...

    async def drain(self, worker_ids: Sequence[str], shutdown: bool) -> None:
        """Assigns no more work to these workers, or to any if none is named; returns when they are idle, or
        after `drain_timeout_s`. With `shutdown`, the cluster then ends.

        Raises InvalidRequest if a name is unknown.
        """
        ...
