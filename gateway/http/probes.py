"""The cluster's health, for load balancers and orchestrators."""

from typing import Any

from msgspec.json import encode
from starlette.requests import Request
from starlette.responses import Response

from ..frontend import Frontend, WorkerState, WorkerStatus
from ..serving import Shared

STALLED_S = 30.0  # of a worker with sequences to compute: longer than any step should take


class Probes:
    """The handlers of /health, /livez, /readyz and /startupz. If there are keys, only clients with one see
    the workers' names; others see their number."""

    def __init__(self, frontend: Frontend, shared: Shared) -> None:
        self._frontend = frontend
        self._shared = shared
        self._has_started = False

    async def live(self, http: Request) -> Response:
        """The server answers."""
        return _answer([])

    async def ready(self, http: Request) -> Response:
        """Requests are accepted."""
        return _answer(self._not_serving())

    async def health(self, http: Request) -> Response:
        """Requests are accepted, and steps end."""
        names_workers = self._names_workers(http)
        stalled = [
            f"{worker.worker_id if names_workers else 'a worker'}: no step has ended for"
            f" {worker.stalled_s:.0f} s"
            for worker in self._frontend.status().workers
            if worker.stalled_s > STALLED_S
        ]
        return _answer([*self._not_serving(), *stalled])

    async def startup(self, http: Request) -> Response:
        """Every worker has been ready once."""
        status = self._frontend.status()
        fractions = [_fraction(worker) for worker in status.workers]
        num_wanted = sum(status.instances.values())
        progress = min(1.0, sum(fractions) / num_wanted) if num_wanted else 1.0
        self._has_started = self._has_started or progress == 1.0
        answer: dict[str, Any] = {
            "phase": "started" if self._has_started else "starting",
            "progress": progress,
        }
        if self._names_workers(http):
            answer["workers"] = {
                worker.worker_id: {"state": worker.state.value, "phase": worker.phase, "progress": fraction}
                for worker, fraction in zip(status.workers, fractions, strict=True)
            }
        return Response(encode(answer), 200 if self._has_started else 503, media_type="application/json")

    async def metrics(self, http: Request) -> Response:
        """Returns all metrics in the Prometheus text format."""
        return Response(self._frontend.metrics(), media_type="text/plain; version=0.0.4")

    def _names_workers(self, http: Request) -> bool:
        return self._shared.access is None or http.state.caller is not None

    def _not_serving(self) -> list[str]:
        status = self._frontend.status()
        if status.shutting_down:
            return ["the cluster is shutting down"]
        return [] if status.serving else ["no worker is ready"]


def _fraction(worker: WorkerStatus) -> float:
    """Returns the completed fraction of a worker's start; 1 only once it is ready."""
    if worker.state is WorkerState.STARTING:
        return min(worker.fraction, 0.99)
    return 0.0 if worker.state is WorkerState.FAILED else 1.0


def _answer(reasons: list[str]) -> Response:
    report = {"status": "unavailable" if reasons else "ok", "reasons": reasons}
    return Response(encode(report), 503 if reasons else 200, media_type="application/json")
