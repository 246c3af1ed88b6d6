"""The live requests: who is being served, how choices and requests end, and what becomes of them when a leg fails.

Between the router's events and its queue, streams and ledger: each method appends commands to the router's outbox.
"""

import msgspec

from ..core.errors import DuplicateRequest
from ..core.messages import Abort, Leg, WorkerCommand
from ..core.request import FinishReason, Request
from .admission import Deadlines, JobQueue
from .config import RouterConfig
from .dispatch import Dispatch, DispatchState, Job, LiveRequest
from .events import (
    Cancel,
    EmitChoiceEnd,
    EmitEnd,
    RequestClosed,
    RouterCommand,
    SendCommand,
    StreamCommand,
    Timeline,
    WorkerIdle,
)
from .ledger import Ledger
from .registry import Worker, WorkerState
from .status import Counters
from .stream import ChoiceStream


class LiveRequests:
    """Request id -> live request, from admission until no worker holds anything for it."""

    def __init__(self, queue: JobQueue, ledger: Ledger, config: RouterConfig, out: list[RouterCommand]) -> None:
        self.config = config
        self.claims_end_s: float | None = None  # when adopted requests that wait for their clients are given up
        self.counters = Counters()
        self.num_live = 0
        self.deadlines = Deadlines()
        self._queue = queue
        self._ledger = ledger
        self._out = out
        self._requests: dict[str, LiveRequest] = {}

    def check_new(self, request_id: str) -> None:
        """Raises DuplicateRequest when a live request has this id."""
        known = self._requests.get(request_id)
        if known is not None and not known.is_ended:
            raise DuplicateRequest(request_id)

    def add(self, request: Request, now_s: float) -> None:
        """Queue an admitted request."""
        live = self._know(LiveRequest(request, now_s))
        self.deadlines.add(live, self.num_live)
        self._queue.push(Job(live, tuple(range(request.sampling.n)), (), now_s))

    def adopt(self, request: Request, now_s: float) -> LiveRequest:
        """A request of an earlier router; its stream is kept for its client until `claims_end_s`."""
        live = self._know(LiveRequest(request, now_s))
        live.unclaimed = []
        live.is_adopted = True
        return live

    def claim(self, request: Request, now_s: float) -> bool:
        """Whether the request was adopted: its client is back, gets all there is, and what nobody serves is queued, in front.

        Raises DuplicateRequest when another request of this id was adopted and is being served.
        """
        live = self._requests.get(request.request_id)
        if live is None or live.unclaimed is None:
            return False
        if msgspec.structs.replace(request, deadline_s=None, client="", traceparent="") != live.request:
            if live.is_served:
                raise DuplicateRequest(request.request_id)
            self._abandon(live, now_s)
            return False
        live.request = request
        self._out += live.unclaimed
        live.unclaimed = None
        self.deadlines.add(live, self.num_live)
        self._queue.push_front([] if live.is_ended else live.unserved_jobs(now_s), now_s)
        self._close_if_done(live, now_s)
        return True

    def timeline(self, request_id: str, now_s: float) -> Timeline | None:
        """Of a live request so far; None when there is none of this name."""
        live = self._requests.get(request_id)
        return None if live is None else live.timeline(now_s)

    def _know(self, live: LiveRequest) -> LiveRequest:
        self._requests[live.request_id] = live
        self.num_live += 1
        self.counters.submitted += 1
        return live

    def _abandon(self, live: LiveRequest, now_s: float) -> None:
        """No client has come for an adopted request."""
        if not live.is_ended:
            self.end(live, FinishReason.CANCELLED, None, now_s)
        live.unclaimed = None
        self._close_if_done(live, now_s)

    def emit(self, live: LiveRequest, command: StreamCommand) -> None:
        """Something for the request's client, now or when it comes."""
        (self._out if live.unclaimed is None else live.unclaimed).append(command)

    def check_integrity(self) -> None:
        """Raises AssertionError when the queue or a count disagrees with the live requests."""
        for job in self._queue:
            assert not job.live.is_ended and job.choices, f"{job.live.request_id}: queued after its end"
        for live in self._requests.values():
            assert not live.is_ended or live.num_open_legs or not live.is_claimed, f"{live.request_id}: closed and still known"
        assert self.num_live == sum(not live.is_ended for live in self._requests.values())

    def cancel(self, event: Cancel, now_s: float) -> None:
        live = self._requests.get(event.request_id)
        if live is None or live.is_ended:
            return
        if event.choice is None:
            self.end(live, event.reason, None, now_s)
        elif 0 <= event.choice < len(live.streams) and live.streams[event.choice].finish_reason is None:
            self._cancel_choice(live, live.streams[event.choice], event.reason, now_s)

    def pause(self, request_id: str, now_s: float) -> None:
        """Take the request from its workers, with the tokens its client has been given; it goes on from there."""
        live = self._requests.get(request_id)
        if live is None or live.is_ended or live.is_paused:
            return
        live.is_paused = True
        live.num_pauses += 1
        self.counters.paused += 1
        for stream in live.streams:
            stream.last_token_s = None
        jobs = list(live.jobs)
        for dispatch in live.dispatches:
            if dispatch.state is DispatchState.RUNNING:
                jobs += self._take_back(dispatch, dispatch.open_legs, "paused: its client did not read", now_s)
        self._queue.park(jobs)

    def resume(self, request_id: str) -> None:
        """A paused request's client reads again."""
        live = self._requests.get(request_id)
        if live is not None and live.is_paused:
            live.is_paused = False
            self._queue.unpark(live)

    def displace(self, dispatch: Dispatch, now_s: float) -> None:
        """Take a dispatch from its workers to make room for another client."""
        self.counters.displaced += 1
        jobs = self._take_back(dispatch, dispatch.open_legs, "made room for another client", now_s)
        if dispatch.live.is_claimed:  # else its client decides, when it comes
            self._queue.push_back(jobs)

    def _take_back(self, dispatch: Dispatch, legs: set[Leg], why: str, now_s: float) -> list[Job]:
        """Abort `legs` of a dispatch; what is left to do goes elsewhere."""
        dispatch.fail(why, now_s)
        self._abort(dispatch, legs)
        jobs = dispatch.unfinished_jobs(now_s)
        for job in jobs:
            job.num_failures = dispatch.job.num_failures
            job.failed_pairs = dispatch.job.failed_pairs
        return jobs

    def _cancel_choice(self, live: LiveRequest, stream: ChoiceStream, reason: FinishReason, now_s: float) -> None:
        stream.end(reason)
        for job in [job for job in live.jobs if stream.choice in job.choices]:
            job.choices = tuple(choice for choice in job.choices if choice != stream.choice)
            if not job.choices:
                self._queue.remove(job)
        running = [d for d in live.dispatches if d.state is DispatchState.RUNNING and stream.choice in d.streams]
        for dispatch in running:
            dispatch.cancelled = True
        self.choice_ended(live, stream, running[0] if running else None, now_s)

    def choice_ended(self, live: LiveRequest, stream: ChoiceStream, dispatch: Dispatch | None, now_s: float) -> None:
        assert stream.finish_reason is not None
        self.emit(live, EmitChoiceEnd(live.request_id, stream.choice, stream.finish_reason))
        live.num_open_choices -= 1
        if dispatch is not None:
            dispatch.num_unfinished -= 1
            if not dispatch.num_unfinished:
                self._finish_dispatch(dispatch)
        if not live.num_open_choices:
            self.end(live, None, None, now_s)

    def _finish_dispatch(self, dispatch: Dispatch) -> None:
        """Workers end by themselves when they saw the last tokens; tell those that did not."""
        dispatch.transition(DispatchState.FINISHED)
        if dispatch.cancelled or (Leg.DECODE in dispatch.open_legs and not dispatch.decode_started):
            self._abort(dispatch, dispatch.open_legs)

    def end(self, live: LiveRequest, reason: FinishReason | None, error: str | None, now_s: float) -> None:
        """The request's only ending. Its legs are aborted and stay accounted until their workers say they are over."""
        for stream in live.streams:
            if stream.finish_reason is None:
                assert reason is not None
                stream.end(reason)
                self.emit(live, EmitChoiceEnd(live.request_id, stream.choice, reason))
        for job in list(live.jobs):
            self._queue.remove(job)
        for dispatch in live.dispatches:
            if dispatch.state is DispatchState.RUNNING:
                dispatch.transition(DispatchState.FINISHED)
                self._abort(dispatch, dispatch.open_legs)
        live.ended_s, live.error = now_s, error
        self.num_live -= 1
        self.counters.count_end(reason)
        self.emit(live, EmitEnd(live.request_id, reason, error, live.timeline(now_s)))
        self._close_if_done(live, now_s)

    def _close_if_done(self, live: LiveRequest, now_s: float) -> None:
        if live.is_ended and live.is_claimed and not live.num_open_legs and not live.is_closed:
            live.is_closed = True
            self._out.append(RequestClosed(live.request_id, live.timeline(now_s)))
            if self._requests.get(live.request_id) is live:
                del self._requests[live.request_id]

    def expire(self, now_s: float) -> None:
        for live in self.deadlines.expired(now_s):
            self.end(live, FinishReason.DEADLINE, None, now_s)
        if self.claims_end_s is not None and now_s >= self.claims_end_s:
            self.claims_end_s = None
            for live in [live for live in self._requests.values() if not live.is_claimed]:
                self._abandon(live, now_s)

    def leg_ended(self, dispatch: Dispatch, leg: Leg, error: str | None, is_invalid: bool, now_s: float) -> None:
        """A worker says that it is done with its leg; `is_invalid`: and that nobody can carry out the request."""
        if error is not None and _is_needed(dispatch, leg):
            if is_invalid:
                self.end(dispatch.live, FinishReason.INVALID, error, now_s)
            else:
                jobs = self._fail(dispatch, leg, error, self._retry_at_s(dispatch, now_s), now_s)
                self._queue.push_front(jobs, now_s)
        self._close_leg(dispatch, leg, now_s)

    def worker_lost(self, worker: Worker, reason: str, now_s: float) -> None:
        """All legs there are over; what they were needed for is dispatched again, in the order it was."""
        jobs: list[Job] = []
        for dispatch in self._ledger.at(worker):
            leg = dispatch.leg_at(worker)
            if _is_needed(dispatch, leg):
                jobs += self._fail(dispatch, leg, f"{worker.worker_id}: {reason}", now_s, now_s)
            self._close_leg(dispatch, leg, now_s)
        self._queue.push_front([job for job in jobs if not job.live.is_ended], now_s)

    def _close_leg(self, dispatch: Dispatch, leg: Leg, now_s: float) -> None:
        worker = self._ledger.close(dispatch, leg)
        if worker.state is WorkerState.DRAINING and not worker.open_legs:
            self._out.append(WorkerIdle(worker.worker_id, worker.incarnation))
        if dispatch.state is DispatchState.RUNNING and not dispatch.open_legs:
            error = "its workers ended their legs without the last tokens"
            jobs = self._fail(dispatch, leg, error, self._retry_at_s(dispatch, now_s), now_s)
            self._queue.push_front(jobs, now_s)
        self._close_if_done(dispatch.live, now_s)

    def send(self, worker: Worker, command: WorkerCommand) -> None:
        if worker.state is not WorkerState.LOST:
            self._out.append(SendCommand(worker.worker_id, worker.incarnation, command))

    def _abort(self, dispatch: Dispatch, legs: set[Leg]) -> None:
        for leg in Leg:
            worker = dispatch.worker_of(leg) if leg in legs else None
            if worker is not None:
                self.send(worker, Abort(transfer=dispatch.transfer))

    def _fail(self, dispatch: Dispatch, leg: Leg, error: str, ready_s: float, now_s: float) -> list[Job]:
        """One leg failed: abort the other, and return what has to be dispatched again, from where its clients are."""
        self.counters.retried += 1
        jobs = self._take_back(dispatch, dispatch.open_legs - {leg}, error, now_s)
        if not dispatch.live.is_claimed:
            return []  # its client decides, when it comes
        num_failures = dispatch.job.num_failures + 1
        if num_failures >= self.config.max_attempts:
            text = f"gave up after {num_failures} attempts, the last failed: {error}"
            self.end(dispatch.live, FinishReason.ERROR, text, now_s)
            return []
        for job in jobs:
            job.ready_s = ready_s
            job.num_failures = num_failures
            job.failed_pairs = dispatch.job.failed_pairs | {dispatch.pair}
            self.counters.resumed += bool(job.output_token_ids)
        return jobs

    def give_up(self, dispatch: Dispatch, now_s: float) -> None:
        """An adopted dispatch is of no use: somebody else serves its choices, they have ended, or half of it is gone."""
        if dispatch.state is DispatchState.RUNNING:
            dispatch.fail("given up when its router was replaced", now_s)
        self._abort(dispatch, dispatch.open_legs)

    def _retry_at_s(self, dispatch: Dispatch, now_s: float) -> float:
        """At once the first time; later there is a pause, as a worker's death is often heard of from its peer first."""
        num_failures = dispatch.job.num_failures
        if not num_failures:
            return now_s
        return now_s + min(self.config.retry_delay_s * 4.0 ** (num_failures - 1), self.config.max_retry_delay_s)


def _is_needed(dispatch: Dispatch, leg: Leg) -> bool:
    """Whether the dispatch fails with this leg. A prefill has done its part once the decode worker has brought a token
    (so it has all the KV) and the client has all first tokens."""
    if dispatch.state is not DispatchState.RUNNING:
        return False
    return leg is Leg.DECODE or not (dispatch.decode_started and dispatch.has_all_first_tokens())
