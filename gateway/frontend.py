"""What the gateway asks of the cluster behind it: to carry out requests, and to tell and change its state.

The only way from here to the router and the workers. The cluster implements it; tests put a small one of
their own here."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from ..core.config import ClusterConfig
from ..core.request import Request
from ..core.status import ClusterStatus, WorkerState, WorkerStatus
from ..router.events import EmitChoiceEnd, EmitEnd, EmitTokens, Timeline

__all__ = ["ClusterStatus", "Frontend", "StreamEvent", "WorkerState", "WorkerStatus"]

StreamEvent = EmitTokens | EmitChoiceEnd | EmitEnd


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
        """The state now and after each change, a few times a second at most; ends when the cluster shuts
        down."""
        ...

    def metrics(self) -> bytes:
        """All metrics in Prometheus' text format (Content-Type: text/plain; version=0.0.4; charset=utf-8)."""
        ...

    def explain(self, request_id: str) -> Timeline | None:
        """Where the time of a request went that is being served, or that ended lately; None when it is not
        known (any more)."""
        ...

    async def apply(self, config: ClusterConfig, dry_run: bool) -> object:
        """Start to make the cluster match `config`; with `dry_run`, only check that it could.

        `config` differs from the one in force only in keys that may change while it runs. Raises
        CapacityError."""
        ...

    async def drain(self, worker_ids: Sequence[str], shutdown: bool) -> None:
        """Give no more work to these workers, or to any if none is named; returns when they are idle, or
        after `drain_timeout_s`. With `shutdown`, the cluster ends after that.

        Raises InvalidRequest when a name is unknown.
        """
        ...
