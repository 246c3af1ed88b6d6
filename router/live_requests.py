"""The live requests by id, to which events are routed. The effect of an event on a request is in
`request_life.py`."""

from collections import deque
from dataclasses import dataclass
from itertools import islice

from ..core.errors import DuplicateRequest
from ..core.failures import FailureKind
from ..core.messages import Leg
from ..core.request import FinishReason, HeldSpec, Request
from .admission import Deadlines, JobQueue
from .config import RouterConfig
from .deaths import Deaths
from .events import Cancel, LossCause, RouterCommand, StreamRead, StreamUnread, Timeline, WorkerLost
from .ledger import Ledger
from .live_request import Dispatch, DispatchState, LiveRequest
from .planning import OpenRequest
from .registered_worker import RegisteredWorker
from .request_events import Abandoned, CancelChoice, Claimed, Due, End, Judged, LegOver, RequestEvent
from .request_life import RequestLife
from .request_states import RequestState
from .status import Counters
from .timelines import timeline_of

BY_DECISION = (FinishReason.CANCELLED, FinishReason.DEADLINE)

# how long work waits for the verdict on a lost worker: its end is known by then, unless its host is down too
MAX_VERDICT_S = 5.0
LATE_S = 0.5  # by which only a router that stood still looks at what is due
ABANDONED_TOKENS = 64  # as many as a stream costs that is abandoned, beside those that are replayed


@dataclass(slots=True)
class _Loss:
    """The dispatches that were at a lost worker, until it is known whether its process died."""

    dispatches: list[Dispatch]
    due_s: float
    is_overdue: bool = False  # they are being served again


class LiveRequests:
    """Request id -> live request, from admission until no worker holds anything for it."""

    def __init__(self, queue: JobQueue, ledger: Ledger, config: RouterConfig) -> None:
        # when adopted requests that wait for their clients are given up
        self.claims_end_s: float | None = None
        self.deadlines = Deadlines()
        self.deaths = Deaths()
        self._life = RequestLife(queue, ledger, config, self.deaths)
        self._queue = queue
        self._ledger = ledger
        self._losses: dict[tuple[str, int], _Loss] = {}  # by the worker's id and incarnation
        self._unclaimed: deque[LiveRequest] = deque()  # and those that have been claimed since
        self._requests: dict[str, LiveRequest] = {}

    @property
    def config(self) -> RouterConfig:
        return self._life.config

    @config.setter
    def config(self, config: RouterConfig) -> None:
        self._life.config = config

    @property
    def counters(self) -> Counters:
        return self._life.counters

    @property
    def has_suspects(self) -> bool:
        """Whether a request waits for a worker that it has alone."""
        return bool(self._queue.suspects)

    @property
    def num_live(self) -> int:
        """The number of requests that are not over."""
        return self._life.num_live

    def timeline(self, request_id: str, now_s: float) -> Timeline | None:
        """Returns the timeline of a live request so far; None for an unknown id."""
        live = self._requests.get(request_id)
        return None if live is None else timeline_of(live, now_s)

    def timelines(self, max_requests: int, scope: str, now_s: float) -> list[Timeline]:
        """Returns the timelines so far of live requests whose ids begin with `scope`, newest first."""
        found = (live for name, live in reversed(self._requests.items()) if name.startswith(scope))
        return [timeline_of(live, now_s) for live in islice(found, max_requests)]

    def open_requests(self, max_requests: int) -> tuple[OpenRequest, ...]:
        """Returns live requests, without their contents: where there are more, the first and the last ones.
        Those that an earlier router had, and those that are set aside, are left out."""
        found = [live for live in self._requests.values() if live.state.is_served and not live.held]
        num_last = max_requests // 2
        if len(found) > max_requests:
            found = found[: max_requests - num_last] + found[-num_last:]
        return tuple(live.facts() for live in found)

    def handle(self, live: LiveRequest, event: RequestEvent, now_s: float) -> list[RouterCommand]:
        """Applies the event to the request, which is forgotten once it is closed."""
        commands = self._life.handle(live, event, now_s)
        if live.state is RequestState.CLOSED and self._requests.get(live.request_id) is live:
            del self._requests[live.request_id]
        return commands

    # requests come

    def adopted(self, request: Request) -> LiveRequest | None:
        """Returns the request of an earlier router that waits for the client of this one.

        Raises DuplicateRequest when a different request has the same id, or when it is being served already.
        """
        live = self._requests.get(request.request_id)
        if live is None or (live.state.is_over and live.state.has_client):
            return None
        if live.state.has_client or (live.running() and not live.is_held_for(request)):
            raise DuplicateRequest(request.request_id)
        return live

    def admit(self, request: Request, adopted: LiveRequest | None, now_s: float) -> list[RouterCommand]:
        """Queues a new request. A request that waited for its client under the same id is abandoned."""
        commands = [] if adopted is None else self.handle(adopted, Abandoned(), now_s)
        live = LiveRequest(request, now_s)
        if num_deaths := self.deaths.num_under(request, now_s):
            live.suspect_from_the_start(num_deaths)
        self._begin(live, now_s)
        self.deadlines.add(live, self.num_live)
        return commands

    def claim(self, adopted: LiveRequest, request: Request, now_s: float) -> list[RouterCommand]:
        """Hands an adopted request to its client, which is back."""
        commands = self.handle(adopted, Claimed(request), now_s)
        self.deadlines.add(adopted, self.num_live)
        return commands

    def adopt(self, held: HeldSpec, now_s: float) -> LiveRequest:
        """Takes over a request of an earlier router; its stream is kept for its client until
        `claims_end_s`."""
        live = self._begin(LiveRequest(held.request(), now_s, held=held), now_s)
        self._unclaimed.append(live)
        return live

    def _begin(self, live: LiveRequest, now_s: float) -> LiveRequest:
        self._requests[live.request_id] = live
        self._life.begin(live, now_s)
        return live

    # what clients say

    def cancel(self, event: Cancel, now_s: float) -> list[RouterCommand]:
        """Ends a request, or one choice of it. Ignored for an unknown id."""
        live = self._requests.get(event.request_id)
        if live is None:
            return []
        if event.choice is None:
            return self.handle(live, End(event.reason), now_s)
        return self.handle(live, CancelChoice(event.choice, event.reason), now_s)

    def note_reading(self, event: StreamUnread | StreamRead, now_s: float) -> list[RouterCommand]:
        """Records that a client leaves too much unread, or reads again. Ignored for an unknown id."""
        live = self._requests.get(event.request_id)
        return [] if live is None else self.handle(live, event, now_s)

    # what workers do

    def end_leg(
        self, dispatch: Dispatch, leg: Leg, error: str | None, kind: FailureKind | None, now_s: float
    ) -> list[RouterCommand]:
        """Handles a worker's report that it is done with its leg, and of what kind its error is."""
        over = LegOver(
            dispatch,
            leg,
            error,
            is_invalid=kind is FailureKind.INVALID,
            is_peer_lost=kind is FailureKind.LOST,
        )
        return self.handle(dispatch.live, over, now_s)

    def lose_worker(
        self, worker: RegisteredWorker, reason: str, cause: LossCause, now_s: float
    ) -> list[RouterCommand]:
        """Closes all legs at a lost worker; work that needed them is dispatched again, in the original order,
        once it is known whether the worker has died."""
        commands: list[RouterCommand] = []
        at_worker = self._ledger.at(worker)
        # all but those that only waited for their KV to leave
        lost = [
            dispatch
            for dispatch in at_worker
            if dispatch.state is not DispatchState.RUNNING or dispatch.needs(dispatch.leg_at(worker))
        ]
        if cause is LossCause.UNKNOWN:
            for dispatch in lost:
                self._life.await_verdict(dispatch, now_s)
        for dispatch in at_worker:
            error = f"{worker.worker_id}: {reason}"
            over = LegOver(dispatch, dispatch.leg_at(worker), error, loss=cause)
            commands += self.handle(dispatch.live, over, now_s)
        if cause is LossCause.DIED:
            commands += self._judge(lost, True, now_s, was_due=False)
        elif cause is LossCause.UNKNOWN and lost:
            self._losses[worker.worker_id, worker.incarnation] = _Loss(lost, now_s + MAX_VERDICT_S)
        return commands

    def explain_loss(self, event: WorkerLost, now_s: float) -> list[RouterCommand]:
        """Handles the news why a worker was lost."""
        if event.cause is LossCause.UNKNOWN:
            return []
        loss = self._losses.pop((event.worker_id, event.incarnation), None)
        has_died = event.cause is LossCause.DIED
        if loss is None or (loss.is_overdue and not has_died):
            return []
        return self._judge(loss.dispatches, has_died, now_s, was_due=not loss.is_overdue)

    def next_verdict_s(self) -> float | None:
        """Returns when the first of the verdicts that are due is waited for no longer."""
        return min((loss.due_s for loss in self._losses.values() if not loss.is_overdue), default=None)

    def _judge(
        self, dispatches: list[Dispatch], has_died: bool, now_s: float, *, was_due: bool
    ) -> list[RouterCommand]:
        commands: list[RouterCommand] = []
        for dispatch in dispatches:
            live = dispatch.live
            if not live.state.is_over:
                commands += self.handle(live, Judged(dispatch, has_died, was_due), now_s)
            elif has_died and any(s.finish_reason in BY_DECISION for s in dispatch.streams.values()):
                self.deaths.suspect(live.request, live.prompt_digest)
        return commands

    # what time does

    def pass_time(self, now_s: float) -> list[RouterCommand]:
        """Ends requests that are past their deadline or unclaimed for too long; queues jobs whose backoff has
        elapsed."""
        commands: list[RouterCommand] = []
        for loss in self._losses.values():
            if loss.is_overdue or now_s < loss.due_s:
                continue
            if now_s > loss.due_s + LATE_S:  # we stood still ourselves: the verdict may have come meanwhile
                loss.due_s = now_s + MAX_VERDICT_S
            else:
                loss.is_overdue = True
                commands += self._judge(loss.dispatches, False, now_s, was_due=True)
        for live in self.deadlines.expired(now_s):
            commands += self.handle(live, End(FinishReason.DEADLINE), now_s)
        if self.claims_end_s is not None and now_s >= self.claims_end_s:
            commands += self._abandon_some(now_s)
        for job in self._queue.wake(now_s):
            commands += self.handle(job.live, Due(), now_s)
        return commands

    def _abandon_some(self, now_s: float) -> list[RouterCommand]:
        """Abandons as many unclaimed streams as one turn of the loop may; `claims_end_s` stays due until
        none is left."""
        commands: list[RouterCommand] = []
        num_left = max(1, self.config.take_over_tokens // ABANDONED_TOKENS)
        while self._unclaimed and num_left:
            live = self._unclaimed.popleft()
            if not live.state.has_client:
                commands += self.handle(live, Abandoned(), now_s)
                num_left -= 1
        if not self._unclaimed:
            self.claims_end_s = None
        return commands

    def check_integrity(self) -> None:
        """Raises AssertionError when a state, the queue or a count disagrees with the location of the
        requests' work."""
        queued = list(self._queue)
        for job in queued:
            assert job.choices, f"{job.live}: a job without choices is queued"
        waiting = {id(job) for job in queued}
        for live in self._requests.values():
            live.check_integrity(waiting)
        num_jobs = sum(len(live.jobs) for live in self._requests.values() if live.state.is_served)
        assert num_jobs == len(queued), f"{len(queued)} jobs are queued, but the requests have {num_jobs}"
        assert self.num_live == sum(not live.state.is_over for live in self._requests.values())
