"""Sets workers apart for suspects: requests that were at a worker when its process died. Each runs there
alone until it is past the point of that death, so that another death shows which request is to blame and
takes nobody with it. Pure; only this file sets workers apart.

READY --first suspect waits--> APART (empties) --last leg ends--> APART (one suspect) --none waits--> READY
"""

from .ledger import Ledger
from .live_request import DispatchState, Job
from .registered_worker import RegisteredWorker
from .registry import Registry

SHARE = 2  # one worker in so many is set apart at a time, at least one
# how long suspects wait for a worker that is starting, before one with long streams empties
EMPTY_AFTER_S = 5.0


class Isolation:
    """Asked once a round: `begin`, `worker_for` each suspect that waits, `end`."""

    def __init__(self, registry: Registry, ledger: Ledger) -> None:
        self._registry = registry
        self._ledger = ledger
        self._idle: list[RegisteredWorker] = []
        self._emptying: list[RegisteredWorker] = []

    def begin(self) -> None:
        """Finds the workers that are set apart and serve no suspect."""
        free = [
            worker
            for worker in self._registry.apart()
            if not worker.is_away and not self._has_suspect(worker)
        ]
        self._idle = [worker for worker in free if not worker.open_legs]
        self._emptying = [worker for worker in free if worker.open_legs]

    def risks_last(self, job: Job) -> bool:
        """Whether the job is likely to kill the last worker that serves while others are expected."""
        if not self._registry.num_expected or not job.live.is_likely_deadly:
            return False
        return sum(worker.takes_work for worker in self._registry) + len(self._registry.apart()) < 2

    def worker_for(self, job: Job, num_expected: int, now_s: float) -> RegisteredWorker | None:
        """Returns an idle worker for the job alone; None when it has to wait for one."""
        for worker in self._idle:
            if worker.capacity_tokens >= job.num_total_tokens:
                self._idle.remove(worker)
                return worker
        for worker in self._emptying:
            if worker.capacity_tokens >= job.num_total_tokens:
                self._emptying.remove(worker)
                return None
        worker_or_none = self._best(job, num_expected > 0 and now_s - job.ready_s < EMPTY_AFTER_S)
        if worker_or_none is None:
            return None
        self._registry.set_apart(worker_or_none)
        return None if worker_or_none.open_legs else worker_or_none

    @property
    def is_exhausted(self) -> bool:
        """Whether no worker is left that another suspect could wait for."""
        return not self._idle and not self._emptying

    def end(self) -> None:
        """Gives back the workers that no suspect needs."""
        for worker in (*self._idle, *self._emptying):
            self._registry.readmit(worker)
        self._idle, self._emptying = [], []

    def _has_suspect(self, worker: RegisteredWorker) -> bool:
        return any(
            dispatch.is_alone and dispatch.state is DispatchState.RUNNING
            for dispatch in self._ledger.at(worker)
        )

    def _best(self, job: Job, may_wait: bool) -> RegisteredWorker | None:
        """Returns the worker that is spared most easily: an idle one, or one whose legs are prompts, which
        end soon."""
        ready = [worker for worker in self._registry if worker.takes_work]
        num_apart = len(self._registry.apart())
        if num_apart >= max(1, (len(ready) + num_apart) // SHARE):
            return None
        able = [worker for worker in ready if worker.capacity_tokens >= job.num_total_tokens]
        if may_wait:
            able = [worker for worker in able if not worker.num_sequences]
        return min(able, key=lambda worker: _sacrifice(worker, ready), default=None)


def _sacrifice(worker: RegisteredWorker, ready: list[RegisteredWorker]) -> tuple[bool, bool, bool, int, str]:
    others = [other for other in ready if other is not worker]
    is_only_one = (worker.role.prefills and not any(other.role.prefills for other in others)) or (
        worker.role.decodes and not any(other.role.decodes for other in others)
    )
    return (
        bool(worker.num_sequences),
        bool(worker.open_legs),
        is_only_one,
        len(worker.open_legs),
        worker.worker_id,
    )
