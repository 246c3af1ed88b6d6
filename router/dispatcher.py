"""Gives the queue's jobs to workers: those that have to run alone, those that others have passed, then all
others in order.

`Router` calls it after each event. The order is the queue's, the choice of workers the placer's, and what a
dispatch changes the request's (`RequestLife`); here stands who may go now, who waits for whom, and who gives
way.
"""

from ..core.latency import LatencyModel
from ..core.messages import LegEnded, StepReport
from ..core.request import FinishReason
from .admission import JobQueue
from .candidates import RoutingDecision
from .events import RouterCommand, RouterEvent
from .isolation import Isolation
from .ledger import Ledger
from .links import Links
from .live_request import Job
from .live_requests import LiveRequests
from .pairs import Pairs
from .placement import Placer
from .registry import Registry
from .request_events import Displaced, End, Placed
from .reservation import Reservation
from .room import RoomMaker
from .waiting import Waiting

CLOSING = "the cluster is shutting down"
# a prediction may exceed the actual prefill time by this factor before a request is given up wrongly
CAUTION = 2.0


class Dispatcher:
    """Places jobs. Attempts count from `first_attempt`."""

    def __init__(
        self,
        registry: Registry,
        ledger: Ledger,
        links: Links,
        pairs: Pairs,
        model: LatencyModel,
        placer: Placer,
        queue: JobQueue,
        requests: LiveRequests,
        first_attempt: int,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._links = links
        self._pairs = pairs
        self._model = model
        self._placer = placer
        self._queue = queue
        self._requests = requests
        self._next_attempt = first_attempt
        self._reservation = Reservation(registry, ledger)
        self._isolation = Isolation(registry, ledger)
        self._room = RoomMaker(registry, ledger, queue.counters)
        self._waiting = Waiting(registry, ledger, queue, self._room)
        self.is_closing = False  # the cluster takes no more requests, and loses its workers

    def dispatch(self, event: RouterEvent, now_s: float) -> list[RouterCommand]:
        """Returns the commands that start jobs; none where `event` changed nothing that jobs wait for."""
        limit = self._requests.config.max_prefill_backlog_tokens
        if isinstance(event, StepReport | LegEnded) and self._waiting.goes_on(event, now_s, limit):
            return []
        self._queue.reconsider()
        commands = self._dispatch_alone(now_s)
        commands += self._dispatch_passed(now_s)
        self._queue.reconsider()  # a client may wait no longer for its own large job
        commands += self._dispatch_in_order(now_s)
        self._waiting.begin(now_s)
        return commands

    def lets_pass(self, job: Job) -> bool:
        """Whether the job need not wait for a large one of its own client."""
        return self._reservation.lets_pass(job)

    def reconsider(self) -> None:
        """Has the next event place jobs, whatever it is: limits have changed."""
        self._waiting.end()

    def end_hopeless_waits(self, now_s: float) -> list[RouterCommand]:
        """Ends requests for which workers have been expected for too long."""
        commands: list[RouterCommand] = []
        limit_s = self._requests.config.max_wait_for_worker_s
        for job in self._queue.awaiting_since(now_s - limit_s):
            if not job.live.state.is_served:
                continue
            if not self._registry.can_hold(job.num_total_tokens):
                error = f"no worker that can serve the request has become ready in {limit_s:g} s"
            elif self._isolation.risks_last(job):
                error = (
                    "workers died of requests like this one, which does not run on the last worker;"
                    f" no other has become ready in {limit_s:g} s"
                )
            else:
                continue
            commands += self._requests.handle(job.live, End(FinishReason.ERROR, error), now_s)
        return commands

    def _dispatch_in_order(self, now_s: float) -> list[RouterCommand]:
        """Places jobs in order until the first that has to wait, and that others may not pass."""
        commands: list[RouterCommand] = []
        makes_room = False
        while (job := self._queue.head()) is not None:
            self._reservation.bind(job)
            placement = self._place(job)
            if placement is not None and self._comes_too_late(job, placement, now_s):
                commands += self._give_up(job, now_s)
            elif placement is not None:
                commands += self._start(self._queue.pop(now_s), placement, now_s)
            elif self._registry.can_hold(job.num_total_tokens):
                if not self._room.waits_for_decode(job):
                    level = self._room.level(job, self._queue.candidates())
                    other = next((other for other in level if self._has_place(other)), None)
                    if other is None:
                        break
                    self._queue.favour(other)
                    continue
                if self._room.may_take(job):
                    commands += self._make_room(job, now_s)
                    if makes_room or not self._pass(job, now_s):
                        break
                    makes_room = True
                    continue
                newcomer = self._room.newcomer(job, self._queue.candidates())
                if newcomer is not None:
                    self._queue.favour(newcomer)
                elif not self._pass(job, now_s):
                    break
            elif self._registry.is_worker_expected:
                self._queue.strand_head(now_s)
            else:
                commands += self._end_unservable(job, now_s)
        return commands

    def _place(self, job: Job) -> RoutingDecision | None:
        """Returns the place for a job; None when it has to wait."""
        placement = self._placer.place(job)
        if placement is None and self._room.waits_for_decode(job):
            host = self._room.host(job)
            if host is not None:
                placement = self._placer.place(job, host)
        return placement

    def _has_place(self, job: Job) -> bool:
        self._reservation.bind(job)
        return self._placer.place(job) is not None

    def _end_unservable(self, job: Job, now_s: float) -> list[RouterCommand]:
        error = CLOSING if self.is_closing else "no worker is left that can serve the request"
        return self._requests.handle(job.live, End(FinishReason.ERROR, error), now_s)

    def _dispatch_alone(self, now_s: float) -> list[RouterCommand]:
        """Places jobs under which a worker died, each at a worker that has no other; one of a request at a
        time."""
        commands: list[RouterCommand] = []
        if not self._queue.suspects and not self._registry.apart():
            return commands
        self._isolation.begin()
        for job in list(self._queue.suspects):
            if job not in self._queue.suspects or any(one.is_alone for one in job.live.running()):
                continue
            if not self._registry.can_hold(job.num_total_tokens):
                if self._registry.is_worker_expected:
                    self._queue.await_worker(job, now_s)
                else:
                    commands += self._end_unservable(job, now_s)
                continue
            if self._isolation.risks_last(job):
                self._queue.await_worker(job, now_s)
                continue
            worker = self._isolation.worker_for(job, self._registry.num_expected, now_s)
            if worker is not None:
                placement = self._placer.alone(job, worker)
                commands += self._start(self._queue.pop_suspect(job, now_s), placement, now_s)
            elif self._isolation.is_exhausted:
                break
        self._isolation.end()
        return commands

    def _dispatch_passed(self, now_s: float) -> list[RouterCommand]:
        """Places large jobs that others have passed; holds room for the first that has to wait still."""
        commands: list[RouterCommand] = []
        while (job := self._queue.first_passed(self._ledger.num_running)) is not None:
            if not self._queue.may_run(job) or self._queue.has_turn_before(job):
                self._queue.defer_passed(job)
                continue
            self._reservation.lift()
            placement = self._place(job)
            if placement is None:
                if self._room.waits_for_decode(job) and self._room.may_take(job):
                    commands += self._make_room(job, now_s)
                if not self._reservation.hold(job, now_s):
                    self._queue.return_passed()
                    break
                return commands
            if self._comes_too_late(job, placement, now_s):
                commands += self._give_up(job, now_s)
            else:
                commands += self._start(self._queue.pop_passed(job, now_s), placement, now_s)
        self._reservation.release()
        return commands

    def _pass(self, job: Job, now_s: float) -> bool:
        """Lets others pass the head of the queue if it is large; returns False when they may not."""
        if not self._reservation.may_be_passed(job):
            return False
        self._queue.pass_head()
        if self._queue.first_passed(self._ledger.num_running) is job:
            self._reservation.hold(job, now_s)
        return True

    def _make_room(self, head: Job, now_s: float) -> list[RouterCommand]:
        """Takes back a dispatch of a client that runs much, to make room for the head of the queue."""
        victim = self._room.victim(head)
        return [] if victim is None else self._requests.handle(victim.live, Displaced(victim), now_s)

    def _comes_too_late(self, job: Job, placement: RoutingDecision, now_s: float) -> bool:
        """Whether the first token would miss the deadline, by a prediction that errs in the client's favour:
        the model has learnt, half of its prediction is already too long, and the worker has reported all that
        it caches. A worker without prompts accepts any: that delays nobody, and the measurement corrects a
        model that has become too pessimistic."""
        live = job.live
        if (
            live.request.deadline_s is None
            or live.first_token_s is not None
            or not placement.prefill.num_prefilling
            or placement.prefill.load.num_unreported_blocks
        ):
            return False
        return self._model.knows_prefill and now_s + placement.ttft_s / CAUTION > live.request.deadline_s

    def _give_up(self, job: Job, now_s: float) -> list[RouterCommand]:
        self._requests.counters.hopeless += 1
        end = End(FinishReason.DEADLINE, "the first token would come after the deadline")
        return self._requests.handle(job.live, end, now_s)

    def _start(self, job: Job, placement: RoutingDecision, now_s: float) -> list[RouterCommand]:
        attempt = self._next_attempt
        self._next_attempt += 1
        self._reservation.note_turn(job)
        request = job.live.request
        if not job.live.dispatches or job.was_unread:  # whatever else comes back has been charged
            self._queue.counters.charge(request.client, placement.num_new_tokens / request.weight)
        if placement.decode is not None and placement.decode is not placement.prefill:
            self._links.started(placement.prefill, placement.decode, now_s)
            self._pairs.started(placement.prefill, placement.decode, now_s)
        return self._requests.handle(job.live, Placed(job, placement, attempt), now_s)
