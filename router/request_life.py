"""A request's life, from its admission until no worker holds anything for it: the effect of each event in
each state.

`RequestLife.REACTIONS` is the complete table. A reaction changes the request, the queue and the ledger, and
returns commands. It does not set QUEUED, RUNNING or BACKING_OFF: they follow from where the request's work is
afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.errors import UnexpectedEvent
from ..core.messages import Abort, Leg, Prefill, Reserve, Serve, WorkerCommand
from ..core.request import FinishReason
from .admission import JobQueue
from .config import RouterConfig
from .deaths import Deaths
from .events import (
    EmitChoiceEnd,
    EmitEnd,
    LossCause,
    RequestClosed,
    RouterCommand,
    SendCommand,
    StreamRead,
    StreamUnread,
    WorkerIdle,
)
from .ledger import Ledger
from .live_request import Dispatch, DispatchState, Job, LiveRequest
from .output_lengths import OutputLengths
from .registered_worker import RegisteredWorker, RoutingState
from .request_events import (
    Abandoned,
    CancelChoice,
    Claimed,
    Displaced,
    Due,
    End,
    GivenUp,
    Judged,
    LastToken,
    LegOver,
    Placed,
    RequestEvent,
    Survived,
)
from .request_states import RequestState
from .status import Counters
from .stream import ChoiceStream
from .timelines import timeline_of

PEER_DEATH_S = 0.1  # by which the end of a transfer may be reported before the death that caused it

Commands = list[RouterCommand]
Reaction = Callable[["RequestLife", LiveRequest, Any, float], Commands]  # takes events of its row
Row = tuple[type[RequestEvent], Reaction, Reaction, Reaction, Reaction, Reaction, Reaction, Reaction]


@dataclass(frozen=True, slots=True)
class Ignored:
    """The event may occur in this state and has no effect."""

    reason: str

    def __call__(self, life: "RequestLife", live: LiveRequest, event: RequestEvent, now_s: float) -> Commands:
        return []


@dataclass(frozen=True, slots=True)
class Illegal:
    """The event can occur in this state only through a bug of ours."""

    def __call__(self, life: "RequestLife", live: LiveRequest, event: RequestEvent, now_s: float) -> Commands:
        raise UnexpectedEvent(str(live), live.state, type(event).__name__, live.story())


never = Illegal()
OVER = Ignored("the request has ended, and the sender did not know yet")
AWAY = Ignored("its client is absent: an earlier router counted its unread tokens")
ASIDE = Ignored("it is already set aside")
READS = Ignored("it is not set aside")


def _table(*rows: Row) -> dict[type[RequestEvent], dict[RequestState, Reaction]]:
    """Builds event -> state -> reaction. Each row has all states except CLOSED, in which nothing happens."""
    return {event: dict(zip(RequestState, (*reactions, never), strict=True)) for event, *reactions in rows}


class RequestLife:
    """The automaton of all requests. It holds none of them: `LiveRequests` does."""

    def __init__(self, queue: JobQueue, ledger: Ledger, config: RouterConfig, deaths: Deaths) -> None:
        self.config = config
        self.counters = Counters()
        self.num_live = 0  # requests that are not over
        self._queue = queue
        self._ledger = ledger
        self._deaths = deaths
        self._lengths = OutputLengths()

    def handle(self, live: LiveRequest, event: RequestEvent, now_s: float) -> Commands:
        """Raises UnexpectedEvent, with the request's story, for an event that cannot happen in its state."""
        commands = self._react(live, event, now_s)
        if live.state.is_served:
            live.settle(now_s)
        return commands if live.state.has_client else live.kept.keep(commands)

    def _react(self, live: LiveRequest, event: RequestEvent, now_s: float) -> Commands:
        return self.REACTIONS[type(event)][live.state](self, live, event, now_s)

    def begin(self, live: LiveRequest, now_s: float) -> None:
        """Begins a request that is admitted (QUEUED) or taken over (UNCLAIMED)."""
        self.num_live += 1
        self.counters.submitted += 1
        live.expected_length = self._lengths.expected(live.request)
        if live.state is RequestState.QUEUED:
            job = Job(live, tuple(range(live.request.sampling.n)), (), now_s)
            live.jobs.append(job)
            self._queue.push(job)

    # work goes to workers, and comes back

    def place(self, live: LiveRequest, event: Placed, now_s: float) -> Commands:
        """Opens a dispatch and sends its legs to their workers."""
        placement = event.placement
        prefill, decode = placement.prefill, placement.decode
        spec = event.job.spec(event.attempt)
        dispatch = Dispatch(event.job, spec, prefill, decode, now_s)
        live.jobs.remove(event.job)
        live.dispatches.append(dispatch)
        self._ledger.open(dispatch, placement)
        self.counters.dispatched += 1
        self.counters.beyond_itl += placement.exceeds_itl
        if decode is prefill:
            self.counters.served_on_one += 1
            return _send(prefill, Serve(spec=spec))
        commands: Commands = []
        if decode is not None:
            reserve = Reserve(
                spec=spec,
                source_worker_id=prefill.worker_id,
                source_incarnation=prefill.incarnation,
                num_source_ranks=prefill.info.address.num_ranks,
            )
            commands += _send(decode, reserve)
        return commands + _send(prefill, Prefill(spec=spec, target=decode.info.address if decode else None))

    def end_leg(self, live: LiveRequest, event: LegOver, now_s: float) -> Commands:
        """Ends a leg whose dispatch may be running: if it was needed and failed, the remaining work is queued
        again."""
        dispatch, error = event.dispatch, event.error
        commands: Commands = []
        if error is not None and dispatch.needs(event.leg):
            if event.is_invalid:
                commands += self._react(live, End(FinishReason.INVALID, error), now_s)
            else:
                commands += self._fail(event, error, now_s)
        commands += self._close_leg(event)
        if dispatch.state is DispatchState.RUNNING and not dispatch.open_legs:
            error = "its workers ended their legs without the last tokens"
            commands += self._fail(event, error, now_s)
        return commands + self._close_if_done(live, now_s)

    def close_leg(self, live: LiveRequest, event: LegOver, now_s: float) -> Commands:
        """Closes a leg of a dispatch that nobody waits for any more."""
        return self._close_leg(event) + self._close_if_done(live, now_s)

    def judge(self, live: LiveRequest, event: Judged, now_s: float) -> Commands:
        """A worker died under the dispatch: its choices run alone from now on, and the request is over if
        they did already. Otherwise it is a failure like others, and they go on."""
        dispatch = event.dispatch
        dispatch.num_verdicts_due -= event.was_due
        if event.has_died:
            return self._suspect(live, event, now_s)
        jobs = [job for job in live.jobs if not dispatch.streams.keys().isdisjoint(job.choices)]
        for job in jobs:
            job.num_failures += dispatch.is_uncounted
        dispatch.is_uncounted = False
        if any(job.num_failures >= self.config.max_attempts for job in jobs):
            return self._exhaust(live, dispatch.failure or "", now_s)
        self._requeue(live, jobs, now_s)
        return []

    def survive(self, live: LiveRequest, event: Survived, now_s: float) -> Commands:
        """Clears the dispatch's choices, which may continue beside others."""
        dispatch = event.dispatch
        dispatch.is_alone = False
        live.suspects.difference_update(dispatch.streams)
        if not live.suspects:
            self._deaths.clear(live.request, live.prompt_digest)
        if not event.moves_on:
            return []
        jobs, commands = self._take_back(dispatch, dispatch.open_legs, "continues beside others", now_s)
        live.jobs += jobs
        self._queue.push_front(jobs, now_s)
        return commands

    def displace(self, live: LiveRequest, event: Displaced, now_s: float) -> Commands:
        """Lets the dispatch's work wait for its client's next turn."""
        self.counters.displaced += 1
        live.num_times_displaced += 1
        jobs, commands = self._take_back(
            event.dispatch, event.dispatch.open_legs, "made room for another client", now_s
        )
        live.jobs += jobs
        self._queue.push_back(jobs)
        return commands

    def withdraw(self, live: LiveRequest, event: Displaced, now_s: float) -> Commands:
        """Same as `displace`, but the remaining work is queued when its client arrives."""
        self.counters.displaced += 1
        return self._take_back(
            event.dispatch, event.dispatch.open_legs, "made room for another client", now_s
        )[1]

    def give_up(self, live: LiveRequest, event: GivenUp, now_s: float) -> Commands:
        """Aborts the open legs of an earlier router's dispatch."""
        if event.dispatch.state is DispatchState.RUNNING:
            self._ledger.fail(event.dispatch, "given up when its router was replaced", now_s)
        return self._abort(event.dispatch, event.dispatch.open_legs)

    def come_due(self, live: LiveRequest, event: Due, now_s: float) -> Commands:
        return []  # the job is at the queue's front: the request is queued if none of its work is running

    # its client

    def set_aside(self, live: LiveRequest, event: StreamUnread, now_s: float) -> Commands:
        """Takes a request from the queue and from its workers; it keeps the tokens that its client has been
        given."""
        live.num_times_unread += 1
        self.counters.unread += 1
        for stream in live.streams:
            stream.last_token_s = None
        for job in live.jobs:
            self._queue.remove(job)
        commands: Commands = []
        for dispatch in live.running():
            jobs, aborts = self._take_back(dispatch, dispatch.open_legs, "its client did not read", now_s)
            live.jobs += jobs
            commands += aborts
        live.transition(RequestState.UNREAD, now_s)
        return commands

    def read_on(self, live: LiveRequest, event: StreamRead, now_s: float) -> Commands:
        """Lets the remaining work wait for its client's turn, which pays for what is computed again."""
        for job in live.jobs:
            job.ready_s, job.was_unread = now_s, bool(live.dispatches)
        self._queue.push_back(live.jobs)
        live.settle(now_s)
        return []

    def hand_over(self, live: LiveRequest, event: Claimed, now_s: float) -> Commands:
        """Gives the client everything produced so far, and queues unserved work in front."""
        live.request = event.request
        live.jobs = live.unserved_jobs(now_s)
        self._queue.push_front(live.jobs, now_s)
        live.settle(now_s)
        return live.kept.take()

    def deliver(self, live: LiveRequest, event: Claimed, now_s: float) -> Commands:
        """Gives the client its whole stream, to the end."""
        live.request = event.request
        live.transition(RequestState.ENDED, now_s)
        return live.kept.take() + self._close_if_done(live, now_s)

    def abandon(self, live: LiveRequest, event: Abandoned, now_s: float) -> Commands:
        """Ends the request, and drops what was kept for its client."""
        ended = live.kept.keep(self._react(live, End(FinishReason.CANCELLED), now_s))
        return ended + self._react(live, event, now_s)

    def drop(self, live: LiveRequest, event: Abandoned, now_s: float) -> Commands:
        live.kept.take()
        live.transition(RequestState.ENDED, now_s)
        return self._close_if_done(live, now_s)

    # endings

    def complete(self, live: LiveRequest, event: LastToken, now_s: float) -> Commands:
        """Completes one choice; with the last of them, the request."""
        return self._choice_ended(live, event.stream, event.dispatch, now_s)

    def cancel_one(self, live: LiveRequest, event: CancelChoice, now_s: float) -> Commands:
        """Ends one choice, wherever its work is."""
        if (
            not (0 <= event.choice < len(live.streams))
            or live.streams[event.choice].finish_reason is not None
        ):
            return []
        stream = live.streams[event.choice]
        stream.end(event.reason)
        for job in [job for job in live.jobs if stream.choice in job.choices]:
            job.choices = tuple(choice for choice in job.choices if choice != stream.choice)
            if not job.choices:
                live.jobs.remove(job)
                self._queue.remove(job)
        dispatches = [dispatch for dispatch in live.running() if stream.choice in dispatch.streams]
        for dispatch in dispatches:
            dispatch.cancelled = True
        commands = self._choice_ended(live, stream, dispatches[0] if dispatches else None, now_s)
        for dispatch in dispatches:
            if dispatch.state is DispatchState.RUNNING:  # others of its choices continue
                commands += self._abort(dispatch, dispatch.open_legs & {Leg.DECODE}, stream.choice)
        return commands

    def end(self, live: LiveRequest, event: End, now_s: float) -> Commands:
        """Emits the request's only ending. Its legs are aborted; they stay accounted until their workers end
        them."""
        commands: Commands = []
        for stream in live.streams:
            if stream.finish_reason is None:
                assert event.reason is not None
                stream.end(event.reason)
                commands.append(EmitChoiceEnd(live.request_id, stream.choice, event.reason))
        if live.suspects and event.reason is not FinishReason.FATAL:
            self._deaths.suspect(live.request, live.prompt_digest)
        for job in live.jobs:
            self._queue.remove(job)
        live.jobs.clear()
        for dispatch in live.running():
            dispatch.transition(DispatchState.FINISHED, now_s)
            commands += self._abort(dispatch, dispatch.open_legs)
        live.ended_s, live.error = now_s, event.error
        self.num_live -= 1
        self.counters.count_end(event.reason)
        live.transition(
            RequestState.ENDED if live.state.has_client else RequestState.UNDELIVERED,
            now_s,
            event.error or "",
        )
        commands.append(EmitEnd(live.request_id, event.reason, event.error, timeline_of(live, now_s)))
        return commands + self._close_if_done(live, now_s)

    def _choice_ended(
        self, live: LiveRequest, stream: ChoiceStream, dispatch: Dispatch | None, now_s: float
    ) -> Commands:
        assert stream.finish_reason is not None
        commands: Commands = [EmitChoiceEnd(live.request_id, stream.choice, stream.finish_reason)]
        self._lengths.note(live.request, len(stream.token_ids))
        live.num_open_choices -= 1
        live.suspects.discard(stream.choice)
        if dispatch is not None:
            dispatch.num_unfinished -= 1
            self._ledger.end_choice(dispatch)
            if not dispatch.num_unfinished:
                commands += self._finish(dispatch, now_s)
        if not live.num_open_choices:
            commands += self._react(live, End(None), now_s)
        return commands

    def _finish(self, dispatch: Dispatch, now_s: float) -> Commands:
        """Aborts legs at workers that have not seen the last tokens; the others end by themselves."""
        dispatch.transition(DispatchState.FINISHED, now_s)
        if dispatch.cancelled or (Leg.DECODE in dispatch.open_legs and not dispatch.decode_started):
            return self._abort(dispatch, dispatch.open_legs)
        return []

    def _close_leg(self, event: LegOver) -> Commands:
        worker = self._ledger.close(event.dispatch, event.leg)
        is_idle = worker.state is RoutingState.DRAINING and not worker.open_legs
        return [WorkerIdle(worker.worker_id, worker.incarnation)] if is_idle else []

    def _close_if_done(self, live: LiveRequest, now_s: float) -> Commands:
        if live.state is not RequestState.ENDED or live.num_open_legs:
            return []
        live.transition(RequestState.CLOSED, now_s)
        return [RequestClosed(live.request_id, timeline_of(live, now_s))]

    # failures

    def _fail(self, event: LegOver, error: str, now_s: float) -> Commands:
        """Handles a failed leg: aborts the other, and queues the remaining work from the client's position.
        A worker's death does not count among the request's failures."""
        dispatch, live = event.dispatch, event.dispatch.live
        self.counters.retried += 1
        jobs, commands = self._take_back(dispatch, dispatch.open_legs - {event.leg}, error, now_s)
        if not live.state.has_client:
            return commands  # the remaining work is queued when its client arrives
        is_death = event.loss in (LossCause.UNKNOWN, LossCause.DIED)
        num_failures = self._num_failures(dispatch) + (not is_death)
        if num_failures >= self.config.max_attempts:
            return commands + self._exhaust(live, error, now_s)
        dispatch.is_uncounted = event.loss is LossCause.UNKNOWN
        due_s = self._due_s(event, now_s)
        for job in jobs:
            job.ready_s = due_s
            job.num_failures = num_failures
            job.failed_pairs = dispatch.job.failed_pairs | {dispatch.pair}
            if (worker := dispatch.worker_of(event.leg)) is not None:
                job.failed_workers = dispatch.job.failed_workers | {worker}
            self.counters.resumed += bool(job.output_token_ids)
        live.jobs += jobs
        self._queue.push_front(jobs, now_s)
        return commands

    def _exhaust(self, live: LiveRequest, error: str, now_s: float) -> Commands:
        text = f"gave up after {self.config.max_attempts} attempts, the last failed: {error}"
        return self._react(live, End(FinishReason.ERROR, text), now_s)

    def _suspect(self, live: LiveRequest, event: Judged, now_s: float) -> Commands:
        dispatch = event.dispatch
        choices = {c for c, stream in dispatch.streams.items() if stream.finish_reason is None}
        later = [other for other in live.running() if choices & other.streams.keys()]
        choices.difference_update(*(other.streams for other in later if other.has_survived))
        later = [other for other in later if not other.has_survived]
        if not choices:
            return []
        if dispatch.is_alone:
            self._deaths.convict(live.request, live.prompt_digest, now_s)
            text = f"workers died of the request, the last while it was there alone: {dispatch.failure}"
            return self._react(live, End(FinishReason.FATAL, text), now_s)
        live.suspects |= choices
        commands: Commands = []
        for other in later:
            jobs, aborts = self._take_back(other, other.open_legs, "a worker died under it before", now_s)
            commands += aborts
            if live.state.has_client:
                live.jobs += jobs
        suspects = [job for job in live.jobs if job.is_suspect]
        for job in suspects:
            job.num_failures = dispatch.job.num_failures
        self._requeue(live, suspects, now_s)
        return commands

    def await_verdict(self, dispatch: Dispatch, now_s: float) -> None:
        """Holds the work of a dispatch, what is queued of it already and what will be, until it is known
        whether its worker has died."""
        dispatch.num_verdicts_due += 1
        live = dispatch.live
        self._requeue(live, [job for job in live.jobs if job.awaits_verdict], now_s)
        if live.state.is_served:
            live.settle(now_s)

    def _requeue(self, live: LiveRequest, jobs: list[Job], now_s: float) -> None:
        """Makes jobs due, each in the place that it belongs to now."""
        for job in jobs:
            job.ready_s = now_s
        if live.state.is_served:
            for job in jobs:
                self._queue.remove(job)
            self._queue.push_front(jobs, now_s)

    def _take_back(
        self, dispatch: Dispatch, legs: set[Leg], why: str, now_s: float
    ) -> tuple[list[Job], Commands]:
        """Aborts `legs` of a dispatch; returns jobs for the remaining work, to be done elsewhere."""
        self._ledger.fail(dispatch, why, now_s)
        commands = self._abort(dispatch, legs)
        jobs = dispatch.unfinished_jobs(now_s)
        for job in jobs:
            job.num_failures = dispatch.job.num_failures
            job.failed_pairs = dispatch.job.failed_pairs
            job.failed_workers = dispatch.job.failed_workers
        return jobs, commands

    def _abort(self, dispatch: Dispatch, legs: set[Leg], choice: int | None = None) -> Commands:
        commands: Commands = []
        for leg in Leg:
            worker = dispatch.worker_of(leg) if leg in legs else None
            if worker is not None:
                commands += _send(worker, Abort(transfer=dispatch.transfer, choice=choice))
        return commands

    def _num_failures(self, dispatch: Dispatch) -> int:
        """Returns the failures in a row before this dispatch: one that brought tokens ends the row."""
        return 0 if dispatch.has_progressed else dispatch.job.num_failures

    def _due_s(self, event: LegOver, now_s: float) -> float:
        """Returns when to retry: at once the first time, later with backoff."""
        if event.loss is not None:
            return now_s
        num_failures = self._num_failures(event.dispatch)
        delay_s = PEER_DEATH_S if event.is_peer_lost else 0.0
        if num_failures:
            backoff_s = self.config.retry_delay_s * 4.0 ** (num_failures - 1)
            delay_s = max(delay_s, min(backoff_s, self.config.max_retry_delay_s))
        return now_s + delay_s

    # fmt: off
    REACTIONS = _table(
        #              QUEUED      RUNNING     BACKING_OFF UNREAD      UNCLAIMED   UNDELIVERED ENDED
        (Placed,       place,      place,      never,      never,      never,      never,      never),
        (LastToken,    never,      complete,   never,      never,      complete,   never,      never),
        (LegOver,      close_leg,  end_leg,    close_leg,  close_leg,  end_leg,    end_leg,    close_leg),
        (Judged,       judge,      judge,      judge,      judge,      judge,      never,      never),
        (Survived,     never,      survive,    never,      never,      never,      never,      never),
        (Displaced,    never,      displace,   never,      never,      withdraw,   never,      never),
        (GivenUp,      never,      never,      never,      never,      give_up,    give_up,    never),
        (Due,          come_due,   come_due,   come_due,   never,      never,      never,      never),
        (CancelChoice, cancel_one, cancel_one, cancel_one, cancel_one, cancel_one, OVER,       OVER),
        (End,          end,        end,        end,        end,        end,        OVER,       OVER),
        (StreamUnread, set_aside,  set_aside,  set_aside,  ASIDE,      AWAY,       AWAY,       OVER),
        (StreamRead,   READS,      READS,      READS,      read_on,    READS,      OVER,       OVER),
        (Claimed,      never,      never,      never,      never,      hand_over,  deliver,    never),
        (Abandoned,    never,      never,      never,      never,      abandon,    drop,       never),
    )
    # fmt: on


def _send(worker: RegisteredWorker, command: WorkerCommand) -> Commands:
    is_lost = worker.state is RoutingState.LOST
    return [] if is_lost else [SendCommand(worker.worker_id, worker.incarnation, command)]
