"""Planted bugs in whose turn it is: the queue, deadlines, shares, priorities, room."""

from unittest.mock import patch

import msgspec

from pdserve.router import fair_queue, reports, reservation
from pdserve.router.admission import Deadlines, JobQueue
from pdserve.router.candidates import RoutingDecision
from pdserve.router.core import Router
from pdserve.router.dispatcher import Dispatcher
from pdserve.router.fair_queue import TokenCounters
from pdserve.router.live_request import Job
from pdserve.router.registry import Registry
from pdserve.router.reservation import Reservation
from pdserve.router.room import RoomMaker

from . import Mutation, Planted


def lose_a_wake_up() -> Planted:
    return patch.object(JobQueue, "unstrand", lambda self: None)


def miss_a_deadline() -> Planted:
    return patch.object(Deadlines, "next_s", lambda self: None)


def drop_requests_before_caches_are_known() -> Planted:
    original = Dispatcher._comes_too_late

    def comes_too_late(self: Dispatcher, job: Job, placement: RoutingDecision, now_s: float) -> bool:
        worker, load = placement.prefill, placement.prefill.load
        worker.load = msgspec.structs.replace(load, num_unreported_blocks=0)
        is_late = original(self, job, placement, now_s)
        worker.load = load
        return is_late

    return patch.object(Dispatcher, "_comes_too_late", comes_too_late)


def ignore_weights() -> Planted:
    original = TokenCounters.charge

    def charge(self: TokenCounters, client: str, num_tokens: float) -> None:
        original(self, client, 1.0)

    return patch.object(TokenCounters, "charge", charge)


def hold_no_room_for_a_large_request() -> Planted:
    return patch.object(reservation, "AGING_S", float("inf"))


def forget_how_often_a_large_request_was_passed() -> Planted:
    original = Reservation.hold

    def hold(self: Reservation, job: Job, now_s: float) -> bool:
        if job is not self._job:
            job.passed_since_s, job.num_passing = None, 0
        return original(self, job, now_s)

    return patch.object(Reservation, "hold", hold)


def let_nobody_pass_a_large_request() -> Planted:
    return patch.object(Reservation, "may_be_passed", lambda self, job: False)


def leave_all_places_to_the_client_that_has_them() -> Planted:
    return patch.object(RoomMaker, "_giver", lambda self, job: None)


def charge_prompts_alone() -> Planted:
    return patch.object(reports, "OUTPUT_TOKEN", 0.0)


def forget_the_bound_on_one_client() -> Planted:
    return patch.object(Router, "_may_run", lambda self, job: True)


def keep_the_places_of_low_priority() -> Planted:
    return patch.object(RoomMaker, "_lower", lambda self, job: None)


def starve_low_priority() -> Planted:
    return patch.object(fair_queue, "FLOOR", 10**9)


def ask_only_the_least_loaded_workers_for_room() -> Planted:
    return patch.object(Registry, "with_decode_room", lambda self, *wanted: [])


FIRST_FOUND: dict[Mutation, int] = {
    lose_a_wake_up: 0,
    miss_a_deadline: 0,
    drop_requests_before_caches_are_known: 62,
    ignore_weights: 153,
    hold_no_room_for_a_large_request: 303,
    let_nobody_pass_a_large_request: 147,
    forget_how_often_a_large_request_was_passed: 198,
    leave_all_places_to_the_client_that_has_them: 51,
    charge_prompts_alone: 153,
    forget_the_bound_on_one_client: 2,
    keep_the_places_of_low_priority: 3,
    starve_low_priority: 8,
    ask_only_the_least_loaded_workers_for_room: 49,
}
