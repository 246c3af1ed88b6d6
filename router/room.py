"""Room for clients that run little, where others run much: who may take it, and from whom. Pure; decides and
changes nothing.

Turns in the queue share what becomes free. They do not help a client that comes when another one has all
places, with streams that go on for long: then one of those is taken back. It goes on in its client's turn,
with the same tokens."""

from collections.abc import Iterable

from ..core.messages import Leg
from .dispatch import Dispatch, DispatchState, Job
from .ledger import Ledger
from .registry import RegisteredWorker, Registry, RoutingState, decode_load

LITTLE = 8  # who runs something takes only what leaves the other one so many times as much


class RoomMaker:
    """Asked when the head of the queue has to wait. Whoever gives up room still runs at least as much as who
    takes it, so that no two clients take it from each other in turn, and nobody is left with nothing."""

    def __init__(self, registry: Registry, ledger: Ledger) -> None:
        self._registry = registry
        self._ledger = ledger

    def waits_for_decode(self, job: Job) -> bool:
        """Whether no worker has a place for its sequences; otherwise it waits for prompts of others, which is
        soon over."""
        return job.needs_decode and not any(
            worker.has_decode_room(job.num_tokens, len(job.choices)) for worker in self._workers(job)
        )

    def may_take(self, job: Job) -> bool:
        """Whether the job's client runs so little that room is made for it, by another client that runs
        most."""
        return self._giver(job) is not None

    def newcomer(self, head: Job, jobs: Iterable[Job]) -> Job | None:
        """The first of the waiting jobs that room is made for, and that may pass the head: its client then
        runs no more than the head's does."""
        num_running = self._ledger.num_running
        if not num_running[head.client]:
            return None
        for job in jobs:
            num_then = num_running[job.client] + len(job.choices)
            if job.client != head.client and num_then <= num_running[head.client] and self.may_take(job):
                return job
        return None

    def victim(self, job: Job) -> Dispatch | None:
        """The dispatch whose place the job takes; None when nobody can give one up, or somebody is about to.

        It is the youngest of those on the least loaded worker, which has least to compute again.
        """
        giver = self._giver(job)
        if giver is None:
            return None
        workers, num_then = set(self._workers(job)), self._num_then(job)
        candidates: list[tuple[float, str, int, Dispatch]] = []
        for dispatch in self._ledger:
            if (
                dispatch.spec.client != giver
                or dispatch.decode not in workers
                or Leg.DECODE not in dispatch.open_legs
            ):
                continue
            if dispatch.state is DispatchState.FAILED:  # its place is not free yet
                return None
            if dispatch.state is DispatchState.RUNNING:
                num_left = self._ledger.num_running[giver] - len(dispatch.spec.choices)
                if num_left >= num_then:
                    worker = dispatch.decode
                    candidates.append(
                        (decode_load(worker), worker.worker_id, -dispatch.transfer.attempt, dispatch)
                    )
        return min(candidates, key=lambda candidate: candidate[:3])[3] if candidates else None

    def _num_then(self, job: Job) -> int:
        return self._ledger.num_running[job.client] + len(job.choices)

    def _giver(self, job: Job) -> str | None:
        """The client that runs most, if it is to give up some of that for the job."""
        num_running = self._ledger.num_running
        giver = max(num_running, key=lambda client: (num_running[client], client), default=None)
        if giver is None or giver == job.client:
            return None
        num_then = self._num_then(job)
        is_little = not num_running[job.client] or num_then * LITTLE <= num_running[giver]
        return giver if is_little and num_then < num_running[giver] else None

    def _workers(self, job: Job) -> list[RegisteredWorker]:
        """Those that could decode it. Without decode workers, prefill workers serve both phases, as
        `Placer.place` has it."""
        able = [
            worker
            for worker in self._registry
            if worker.state is RoutingState.READY and worker.capacity_tokens >= job.num_total_tokens
        ]
        return [worker for worker in able if worker.role.decodes] or able
