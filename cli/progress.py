"""The progress of the workers' start: bars on a terminal, else lines for changes only."""

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from ..core.config_types import format_size
from ..proto import pdserve_pb2 as pb
from .client import CommandFailed
from .status import STATES

MAX_RESTARTS = 2  # restarts of a worker before the wait for its start gives up
LOADING = "loading weights"  # a worker's phase
STEP = 0.25  # share of a start; smaller progress makes no line


class StatusLines:
    """Turns the states of a cluster into lines for a terminal or a log."""

    def __init__(self, weights_bytes: int | None = None) -> None:
        self.weights_bytes = weights_bytes  # of each instance, for how much of them is loaded
        self._shown: dict[str, tuple[object, ...]] = {}
        self._degraded = ""

    def changes(self, status: pb.ClusterStatus) -> Iterator[str]:
        """Returns the lines that report this state, given the previous ones."""
        names = {worker.worker_id for worker in status.workers}
        for worker in status.workers:
            shown = (worker.state, worker.phase, int(worker.fraction / STEP), worker.message)
            if self._shown.get(worker.worker_id) != shown:
                self._shown[worker.worker_id] = shown
                yield _line(worker, self.weights_bytes)
        for name in [name for name in self._shown if name not in names]:
            del self._shown[name]
            yield f"{name}: gone"
        if status.degraded != self._degraded and status.serving:
            self._degraded = status.degraded
            yield f"serving; {status.degraded}" if status.degraded else "serving as configured"


class StartBars:
    """A bar for each starting worker, as long as it is used as a context; nothing at all where there is no
    terminal."""

    def __init__(self, weights_bytes: int | None = None) -> None:
        self._weights_bytes = weights_bytes
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[phase]}", markup=False),  # it may name what is in a checkpoint
        )
        console = Console(file=sys.stderr)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self.are_shown = console.is_terminal

    def __enter__(self) -> "StartBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bars away; idempotent."""
        self._progress.stop()

    def update(self, status: pb.ClusterStatus) -> None:
        for worker in status.workers:
            task = self._tasks.get(worker.worker_id)
            if task is None:
                task = self._tasks[worker.worker_id] = self._progress.add_task(
                    worker.worker_id, total=1.0, phase=""
                )
            done = 1.0 if worker.state == pb.WORKER_STATE_READY else worker.fraction
            phase = worker.message or _phase(worker, self._weights_bytes)
            self._progress.update(task, completed=done, phase=phase)


def check_starts(status: pb.ClusterStatus, max_restarts: int) -> None:
    """Raises CommandFailed for a worker that has been restarted more often and still fails."""
    for worker in status.workers:
        if worker.num_restarts > max_restarts and worker.message:
            raise CommandFailed(f"{worker.worker_id} does not start: {worker.message}")


def is_ready(status: pb.ClusterStatus) -> bool:
    """Whether every configured instance is ready."""
    return all(pool.ready >= pool.instances for pool in status.pools)


def ready_line(status: pb.ClusterStatus, address: str, http_address: str | None = None) -> str:
    pools = " and ".join(f"{pool.ready} {pool.role}" for pool in status.pools)
    where = address if http_address is None else f"{address} (gRPC) and http://{http_address}/v1"
    return f"ready: {status.model} at {where}, {pools} instances"


def _phase(worker: pb.WorkerStatus, weights_bytes: int | None) -> str:
    if worker.phase != LOADING:
        return worker.phase
    if weights_bytes is None:
        return f"{LOADING} ({worker.fraction:.0%})"
    return f"{LOADING}, {format_size(round(worker.fraction * weights_bytes))} of {format_size(weights_bytes)}"


def _line(worker: pb.WorkerStatus, weights_bytes: int | None) -> str:
    state = STATES.get(worker.state, "Unknown").lower()
    parts = [f"{worker.worker_id}: {state}"]
    if worker.state == pb.WORKER_STATE_STARTING and worker.phase:
        parts.append(_phase(worker, weights_bytes))
    if worker.message:
        parts.append(worker.message)
    return ", ".join(parts)
