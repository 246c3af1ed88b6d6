"""Whether the queue still waits for the same: whether looking at it again would place nothing.

Workers' reports come far more often than room does. A job that was not placed waits until a worker with room
for it has more than before, or another job comes to the head of the queue. Predictions and counters change
with every report, and matter less: they are looked at anew after `REVIEW_S`."""

from dataclasses import dataclass

from ..core.messages import LegEnded, StepReport
from .admission import JobQueue
from .ledger import Ledger
from .live_request import Job
from .registered_worker import RegisteredWorker
from .registry import Registry
from .room import RoomMaker

REVIEW_S = 0.05  # at the next report after that


@dataclass(frozen=True, slots=True)
class _Look:
    """The jobs that a look at the queue left waiting."""

    at_s: float
    num_added: int  # to the queue, by then
    head: Job | None
    for_decode: bool  # the head waits for a place to decode, not for others' prompts
    passed: Job | None  # the first of those that others have passed
    takes_room: bool  # others give up places for it, one after the other


class Waiting:
    """Remembers the last look at the queue. Pure; changes no account."""

    def __init__(self, registry: Registry, ledger: Ledger, queue: JobQueue, room: RoomMaker) -> None:
        self._registry = registry
        self._ledger = ledger
        self._queue = queue
        self._room = room
        self._look: _Look | None = None

    def begin(self, now_s: float) -> None:
        """Records that everything that could be placed now has been."""
        head, passed = self._queue.head(), self._queue.first_passed(self._ledger.num_running)
        for_decode = head is not None and self._room.waits_for_decode(head)
        takes_room = any(job is not None and self._room.may_take(job) for job in (head, passed))
        self._look = _Look(now_s, self._queue.num_added, head, for_decode, passed, takes_room)
        self._registry.take_roomier()

    def end(self) -> None:
        """Has the queue looked at, whatever happens next."""
        self._look = None

    def goes_on(self, report: StepReport | LegEnded, now_s: float, backlog_tokens: int | None) -> bool:
        """Whether a worker's report has changed nothing that jobs wait for. `backlog_tokens`: the bound on
        queued prefill tokens, as in `RouterConfig`."""
        look, queue = self._look, self._queue
        if (
            look is None
            or queue.num_added != look.num_added
            or queue.suspects
            or self._registry.has_apart
            or (look.takes_room and isinstance(report, LegEnded))
            or (now_s >= look.at_s + REVIEW_S and len(queue))
        ):
            return False
        queue.reconsider()
        if queue.head() is not look.head or queue.first_passed(self._ledger.num_running) is not look.passed:
            return False
        return not any(self._helps(worker, look, backlog_tokens) for worker in self._registry.take_roomier())

    def _helps(self, worker: RegisteredWorker, look: _Look, backlog_tokens: int | None) -> bool:
        """Whether a worker with more room than before has enough for one of the jobs. What is held may be
        there for the job, or for a client that has come to hold less."""
        if not worker.takes_work:
            return False
        for_prefill = (look.passed, None if look.for_decode else look.head)
        if any(job and worker.has_prefill_room(job.num_tokens, backlog_tokens) for job in for_prefill):
            return True
        return any(
            self._registry.is_able_to_decode(worker, job.num_total_tokens)
            and worker.has_decode_room(
                job.num_tokens, len(job.choices), job.num_expected_tokens, with_held=True
            )
            for job in (look.head if look.for_decode else None, look.passed)
            if job is not None
        )
