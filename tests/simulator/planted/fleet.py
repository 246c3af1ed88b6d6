"""Planted bugs in workers' processes, their connections and their hosts."""

from typing import Any
from unittest.mock import patch

from pdserve.core.hosts import HostState
from pdserve.router import hosts, supervisor
from pdserve.router.cores import Capacity, CoreAllocator
from pdserve.router.events import LossCause
from pdserve.router.fleet import Fleet
from pdserve.router.fleet_member import Member, MemberState
from pdserve.router.hosts import HostChecked, Hosts, SeenHost
from pdserve.router.places import Places
from pdserve.router.supervisor import ProcessEnded, Supervisor
from pdserve.router.worker_sessions import Session, ToSupervisor, WorkerSessions

from . import Mutation, Planted


def stop_a_worker_without_draining_it() -> Planted:
    original = Fleet._retire

    def retire(self: Fleet, member: Member, now_s: float) -> None:
        original(self, member, now_s)
        if member.state is MemberState.DRAINING:
            self._stop(member, now_s)

    return patch.object(Fleet, "_retire", retire)


def place_workers_on_a_host_that_has_died() -> Planted:
    return patch.object(CoreAllocator, "close", lambda self, node_id: None)


def forget_that_a_lost_host_is_asked_for() -> Planted:
    original = Hosts._look

    def look(self: Hosts, seen: tuple[SeenHost, ...], now_s: float) -> None:
        lost = [name for name, missing in self._missing.items() if missing.state is HostState.LOST]
        original(self, tuple(host for host in seen if host.address not in lost), now_s)

    return patch.object(Hosts, "_look", look)


def forget_running_instances_when_a_host_is_opened() -> Planted:
    def open_host(self: CoreAllocator, node_id: str, capacity: Capacity) -> None:
        instances, self._on = self._on, {}
        original(self, node_id, capacity)
        self._on = instances

    original = CoreAllocator.open
    return patch.object(CoreAllocator, "open", open_host)


def place_workers_in_the_order_in_which_they_ask() -> Planted:
    return patch.object(Places, "_rank", lambda self, instance, num_placed: 0.0)


def recall_a_worker_that_must_leave_its_host() -> Planted:
    original = Fleet._replace

    def replace(self: Fleet, workers, now_s: float) -> None:  # type: ignore[no-untyped-def]
        original(self, workers, now_s)
        for member in self._roster:
            member.is_replaced = False

    return patch.object(Fleet, "_replace", replace)


def keep_serving_on_a_host_that_is_taken_out_of_the_file() -> Planted:
    return patch.object(hosts, "_is_listed", lambda seen, expected: True)


def time_out_a_worker_that_waits_for_a_host() -> Planted:
    original = Fleet._start

    def start(self: Fleet, member: Member, now_s: float) -> None:
        original(self, member, now_s)
        member.due_s = now_s + 1.0
        self._roster.note(member)

    return patch.object(Fleet, "_start", start)


def never_check_a_refused_host_again() -> Planted:
    original = Hosts._checked

    def checked(self: Hosts, event: HostChecked, now_s: float) -> None:
        original(self, event, now_s)
        for host in self._hosts.values():
            host.check_again_s = None

    return patch.object(Hosts, "_checked", checked)


def reassign_the_cores_of_a_process_before_it_is_gone() -> Planted:
    original = Supervisor._stop

    def stop(self: Supervisor[Any], key: tuple[str, int], reason: str, now_s: float, *, may_ask: bool = True):  # type: ignore[no-untyped-def]
        actions = original(self, key, reason, now_s, may_ask=may_ask)
        self.places.give_back(key)
        return actions

    return patch.object(Supervisor, "_stop", stop)


def forget_a_process_that_ends_by_itself() -> Planted:
    """Frees its cores without reporting its end."""
    original = Supervisor._ended

    def ended(self: Supervisor[Any], event: ProcessEnded, now_s: float) -> None:
        if self.processes[event.worker_id, event.incarnation].is_expected:
            self._forget((event.worker_id, event.incarnation), event.reason)
        else:
            original(self, event, now_s)

    return patch.object(Supervisor, "_ended", ended)


def hide_a_broken_connection_from_the_supervisor() -> Planted:
    original = WorkerSessions.closed

    def closed(self: WorkerSessions[Any], connection: Any, error: str | None, now_s: float) -> list[Any]:
        commands = original(self, connection, error, now_s)
        return [command for command in commands if not isinstance(command, ToSupervisor)]

    return patch.object(WorkerSessions, "closed", closed)


def keep_only_the_last_frame_of_held_legs() -> Planted:
    original = WorkerSessions._report

    def report(self: WorkerSessions[Any], connection: Any, session: Session, message: Any) -> list[Any]:
        session.held = ()
        return original(self, connection, session, message)

    return patch.object(WorkerSessions, "_report", report)


def lose_the_workers_that_hang_up_while_the_router_stands_still() -> Planted:
    return patch.object(WorkerSessions, "_is_our_doing", lambda self, session, now_s: False)


def count_our_own_delay_towards_a_workers_start() -> Planted:
    original = Fleet._late

    def late(self: Fleet, member: Member, now_s: float) -> None:
        member.num_beats_left = 0
        original(self, member, now_s)

    return patch.object(Fleet, "_late", late)


def kill_what_has_ended_while_we_stood_still() -> Planted:
    return patch.object(supervisor, "LATE_S", float("inf"))


def take_each_lost_connection_for_a_death() -> Planted:
    original = Supervisor._forget

    def forget(self: Supervisor[Any], key: tuple[str, int], reason: str, cause: object = None) -> None:
        original(self, key, reason, LossCause.DIED)

    return patch.object(Supervisor, "_forget", forget)


def plan_against_the_memory_that_living_workers_hold() -> Planted:
    return patch.object(CoreAllocator, "num_bytes_taken", lambda self, node_id: 0)


def believe_what_a_host_said_before_a_worker_ended() -> Planted:
    original = Hosts._checked

    def checked(self: Hosts, event: HostChecked, now_s: float) -> None:
        if event.node_id in self._hosts:
            self._hosts[event.node_id].there = tuple(self.places.cores.on(event.node_id))
        original(self, event, now_s)

    return patch.object(Hosts, "_checked", checked)


FIRST_FOUND: dict[Mutation, int] = {
    stop_a_worker_without_draining_it: 76,
    place_workers_on_a_host_that_has_died: 7,
    forget_that_a_lost_host_is_asked_for: 72,
    forget_running_instances_when_a_host_is_opened: 33,
    place_workers_in_the_order_in_which_they_ask: 16,
    recall_a_worker_that_must_leave_its_host: 7,
    keep_serving_on_a_host_that_is_taken_out_of_the_file: 28,
    time_out_a_worker_that_waits_for_a_host: 1,
    never_check_a_refused_host_again: 122,
    reassign_the_cores_of_a_process_before_it_is_gone: 6,
    forget_a_process_that_ends_by_itself: 88,
    hide_a_broken_connection_from_the_supervisor: 13,
    keep_only_the_last_frame_of_held_legs: 78,
    lose_the_workers_that_hang_up_while_the_router_stands_still: 78,
    count_our_own_delay_towards_a_workers_start: 78,
    kill_what_has_ended_while_we_stood_still: 493,
    take_each_lost_connection_for_a_death: 13,
    plan_against_the_memory_that_living_workers_hold: 47,
    believe_what_a_host_said_before_a_worker_ended: 151,
}
