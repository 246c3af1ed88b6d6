"""Lets other jobs pass a large one that has no room yet, and holds room for it meanwhile.

The blocks that are held on one worker grow with the time since others first passed the job, and with those
of its own client that have: what is free is used at first, and the job is placed at last however many smaller
ones arrive. Clients that hold less than the job's own client use the room nevertheless: it waits for itself
then, so few others of its own client may pass it. Pure; changes no account."""

from .ledger import Ledger
from .live_request import Job
from .registered_worker import RegisteredWorker
from .registry import Registry

AGING_S = 5.0  # after which all that the job needs is held
AGING_TURNS = 16  # or after so many dispatches of its own client
MAX_OWN_TURNS = 2 * AGING_TURNS  # dispatches of its own client that pass it
LARGE = 8  # a job is large when it takes more than this fraction of the blocks of each worker


class Reservation:
    """Room for at most one job, on at most one worker."""

    def __init__(self, registry: Registry, ledger: Ledger) -> None:
        self._registry = registry
        self._ledger = ledger
        self._job: Job | None = None
        self._worker: RegisteredWorker | None = None
        self._num_blocks = self._num_sequences = 0  # held on the worker

    def may_be_passed(self, job: Job) -> bool:
        """Whether the job is large and some worker has room, though not for this job."""
        return self._registry.has_decode_room(1, job.num_total_tokens, 1) and all(
            _blocks_wanted(job, worker) * LARGE > worker.info.num_blocks
            for worker in self._registry.able_to_decode(job.num_total_tokens)
        )

    def hold(self, job: Job, now_s: float) -> bool:
        """Holds room for the job, by its age; returns False when no worker could ever have it."""
        if job is not self._job:
            self.release()
            self._job = job
        if job.passed_since_s is None:
            job.passed_since_s = now_s
        num_tokens = job.num_total_tokens
        if self._worker is None or not self._registry.is_able_to_decode(self._worker, num_tokens):
            self.lift()  # also after a flip
            workers = self._registry.able_to_decode(num_tokens)
            if not workers:
                return False
            self._worker = max(workers, key=lambda worker: (worker.num_free_blocks, worker.worker_id))
        share = min(1.0, max((now_s - job.passed_since_s) / AGING_S, job.num_passing / AGING_TURNS))
        self._num_sequences = len(job.choices) if share == 1.0 else 0
        self._num_blocks = int(share * _blocks_wanted(job, self._worker))
        self._registry.hold(self._worker, self._num_blocks, self._num_sequences)
        return True

    def note_turn(self, job: Job) -> None:
        """A job is dispatched, maybe past the one for which room is held."""
        if self._job is not None and job is not self._job:
            self._job.num_passing += job.client == self._job.client

    def lets_pass(self, job: Job) -> bool:
        """Whether the job may go before the one for which room is held. After some, a client's own jobs wait
        with it: each would keep the client among those that hold much, whose reserved room others use."""
        if self._job is None or job is self._job or job.client != self._job.client:
            return True
        return self._job.num_passing < MAX_OWN_TURNS or job.priority < self._job.priority

    def bind(self, job: Job) -> None:
        """Keeps `job` from the room that is held, unless its client, with it, holds no more blocks than the
        client for which it is held does."""
        if self._job is None or self._worker is None:
            return
        num_blocks = self._ledger.num_blocks
        num_then = num_blocks[job.client] + self._worker.blocks_for(job.num_tokens, len(job.choices))
        if num_then <= num_blocks[self._job.client]:
            self.lift()
        else:
            self._registry.hold(self._worker, self._num_blocks, self._num_sequences)

    def lift(self) -> None:
        """Lets the job itself see the room that is held for it."""
        if self._worker is not None:
            self._registry.hold(self._worker, 0, 0)

    def release(self) -> None:
        """Ends the reservation."""
        self.lift()
        self._job = self._worker = None


def _blocks_wanted(job: Job, worker: RegisteredWorker) -> int:
    return worker.blocks_wanted(job.num_tokens, len(job.choices), job.num_expected_tokens)
