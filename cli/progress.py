"""How far workers' start is, in lines that say only what is new."""

from collections.abc import Iterator

from ..proto import pdserve_pb2 as pb
from .status import STATES

STEP = 0.25  # of a start; smaller progress makes no line


class StatusLines:
    """Turns the states of a cluster into lines for a terminal or a log."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[object, ...]] = {}

    def changes(self, status: pb.ClusterStatus) -> Iterator[str]:
        """What a person should hear of this state, after those before."""
        names = {worker.worker_id for worker in status.workers}
        for worker in status.workers:
            shown = (worker.state, worker.phase, int(worker.fraction / STEP), worker.message)
            if self._shown.get(worker.worker_id) != shown:
                self._shown[worker.worker_id] = shown
                yield _line(worker)
        for name in [name for name in self._shown if name not in names]:
            del self._shown[name]
            yield f"{name}: gone"


def is_ready(status: pb.ClusterStatus) -> bool:
    """Whether every configured instance is ready."""
    return all(pool.ready >= pool.instances for pool in status.pools)


def ready_line(status: pb.ClusterStatus, address: str) -> str:
    pools = " and ".join(f"{pool.ready} {pool.role}" for pool in status.pools)
    return f"ready: {status.model} at {address}, {pools} instances"


def _line(worker: pb.WorkerStatus) -> str:
    state = STATES.get(worker.state, "Unknown").lower()
    parts = [f"{worker.worker_id}: {state}"]
    if worker.state == pb.WORKER_STATE_STARTING and worker.phase:
        parts.append(f"{worker.phase} {worker.fraction:.0%}")
    if worker.message:
        parts.append(worker.message)
    return ", ".join(parts)
