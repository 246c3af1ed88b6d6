"""Planted bugs in a request's life: its stream, its failures, the heads and workers that it outlives."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from pdserve.core.failures import FailureKind
from pdserve.core.latency import LatencyModel
from pdserve.core.messages import HeldLeg, LegEnded
from pdserve.core.worker_speed import Correction
from pdserve.router.adoption import HeldDispatch
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.deaths import Deaths
from pdserve.router.events import RouterCommand
from pdserve.router.health import Health
from pdserve.router.links import Links
from pdserve.router.live_request import Dispatch, Job, LiveRequest
from pdserve.router.pairs import Pairs
from pdserve.router.registered_worker import RegisteredWorker
from pdserve.router.reports import WorkerReports
from pdserve.router.request_life import RequestLife
from pdserve.router.reunion import Reunion
from pdserve.router.stream import ChoiceStream
from pdserve.router.take_over import TakeOver

from . import Mutation, Planted


def repeat_a_token_after_a_resume() -> Planted:
    original = Dispatch.unfinished_jobs

    def unfinished_jobs(self: Dispatch, now_s: float) -> list[Job]:
        jobs = original(self, now_s)
        for job in jobs:
            for stream in self.live.streams:
                if job.output_token_ids and stream.choice in job.choices:
                    stream.token_ids.pop()
        return jobs

    return patch.object(Dispatch, "unfinished_jobs", unfinished_jobs)


def accept_tokens_out_of_order() -> Planted:
    def accept(self: ChoiceStream, output):  # type: ignore[no-untyped-def]
        if self.finish_reason is not None:
            return ()
        self._take(output)
        return (output,)

    return patch.object(ChoiceStream, "accept", accept)


def leave_workers_working_for_an_ended_request() -> Planted:
    return patch.object(RequestLife, "_abort", lambda self, dispatch, legs: [])


def forget_to_abort_the_broken_dispatches_that_a_new_router_finds() -> Planted:
    original = TakeOver._resume

    def resume(self: TakeOver, live: LiveRequest, held: HeldDispatch) -> Iterator[int]:
        if not held.is_broken:
            yield from original(self, live, held)
            return
        with patch.object(RequestLife, "_abort", lambda self, dispatch, legs: []):
            yield from original(self, live, held)

    return patch.object(TakeOver, "_resume", resume)


def count_attempts_from_0_in_a_new_router() -> Planted:
    original = Router.__init__

    def init(
        self: Router, config: RouterConfig, model: LatencyModel, *, first_attempt: int, adopts: bool
    ) -> None:
        original(self, config, model, adopts=adopts)

    return patch.object(Router, "__init__", init)


def forget_which_links_between_hosts_are_broken() -> Planted:
    return patch.object(Links, "avoids", lambda self, prefill, decode: False)


def leave_links_untried_until_a_request_needs_them() -> Planted:
    return patch.object(Links, "workers_changed", lambda self: None)


def forget_what_workers_computed_while_they_were_away() -> Planted:
    original = Reunion.carry_out

    def carry_out(
        self: Reunion, worker: RegisteredWorker, held: Iterable[HeldLeg], now_s: float
    ) -> list[RouterCommand]:
        with patch.object(WorkerReports, "on_tokens", lambda self, worker, outputs, now_s: []):
            return original(self, worker, held, now_s)

    return patch.object(Reunion, "carry_out", carry_out)


def believe_that_aborts_reach_workers_that_are_away() -> Planted:
    return patch.object(Reunion, "_is_wanted", lambda self, worker, leg: True)


def take_everything_over_in_one_turn() -> Planted:
    original = TakeOver.advance

    def advance(self: TakeOver, now_s: float) -> list[RouterCommand]:
        commands = original(self, now_s)
        while not self.is_complete:
            commands += original(self, now_s)
        return commands

    return patch.object(TakeOver, "advance", advance)


def give_a_gray_worker_as_much_as_others() -> Planted:
    return patch.object(Health, "failed", lambda self, worker, error, now_s: None)


def forget_which_pairs_of_workers_have_failed() -> Planted:
    return patch.object(Pairs, "avoids", lambda self, prefill, decode: False)


@contextmanager
def blame_nobody_for_altered_bytes() -> Iterator[None]:
    original = WorkerReports._note_health

    def note_health(
        self: WorkerReports, dispatch: Dispatch, worker: RegisteredWorker, event: LegEnded, now_s: float
    ) -> None:
        if event.kind is not FailureKind.CORRUPT:
            original(self, dispatch, worker, event, now_s)

    with patch.object(WorkerReports, "_note_health", note_health):
        yield


def expect_of_a_slow_worker_what_others_do() -> Planted:
    return patch.object(Correction, "observe", lambda self, ratio: None)


def let_workers_hold_blocks_for_each_other() -> Planted:
    return patch.multiple(RegisteredWorker, may_send=True, may_receive=True)


def run_suspects_beside_others() -> Planted:
    return patch.object(Job, "is_suspect", False)


def dispatch_again_before_the_verdict() -> Planted:
    return patch.object(Job, "awaits_verdict", False)


def forget_which_requests_have_killed() -> Planted:
    return patch.object(Deaths, "num_under", lambda self, request, now_s: 0)


def count_attempts_over_the_whole_life_of_a_stream() -> Planted:
    return patch.object(RequestLife, "_num_failures", lambda self, dispatch: dispatch.job.num_failures)


FIRST_FOUND: dict[Mutation, int] = {
    repeat_a_token_after_a_resume: 1,
    accept_tokens_out_of_order: 0,
    leave_workers_working_for_an_ended_request: 0,
    forget_to_abort_the_broken_dispatches_that_a_new_router_finds: 680,
    count_attempts_from_0_in_a_new_router: 365,
    forget_which_links_between_hosts_are_broken: 21,
    leave_links_untried_until_a_request_needs_them: 2,
    forget_what_workers_computed_while_they_were_away: 78,
    believe_that_aborts_reach_workers_that_are_away: 788,
    take_everything_over_in_one_turn: 36,
    give_a_gray_worker_as_much_as_others: 83,
    forget_which_pairs_of_workers_have_failed: 721,
    blame_nobody_for_altered_bytes: 170,
    expect_of_a_slow_worker_what_others_do: 68,
    let_workers_hold_blocks_for_each_other: 61,
    run_suspects_beside_others: 26,
    dispatch_again_before_the_verdict: 77,
    forget_which_requests_have_killed: 26,
    count_attempts_over_the_whole_life_of_a_stream: 192,
}
