"""Connections to the workers' port, without a socket: admission, readiness and loss of workers."""

import pytest

from pdserve.core.messages import (
    Heartbeat,
    HeldLeg,
    Hello,
    Holds,
    HostFull,
    Leg,
    LoadProgress,
    Ready,
    Role,
    StepReport,
    WorkerLoad,
)
from pdserve.router import worker_sessions
from pdserve.router.events import LossCause, WorkerLost, WorkerReady
from pdserve.router.supervisor import ConnectionLost, WorkerProgress
from pdserve.router.worker_sessions import (
    MAX_SILENT_BEATS,
    HangUp,
    Refused,
    Say,
    ToRouter,
    ToSupervisor,
    WorkerSessions,
)

from ..worker.chain_model import spec
from .cluster import worker_info

KEY = "decode-0", 1
HELLO = Hello(worker_id="decode-0", incarnation=1)
READY = Ready(info=worker_info("decode-0", Role.DECODE))
REPORT = StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad())
SILENT = f"silent for {MAX_SILENT_BEATS * 0.5:.1f} s"


@pytest.fixture
def sessions() -> WorkerSessions[str]:
    """Sessions with one silent connection, named `a`; one worker is expected."""
    sessions: WorkerSessions[str] = WorkerSessions(lambda key: key == KEY)
    assert sessions.opened("a") == []
    return sessions


def held(name: str) -> HeldLeg:
    return HeldLeg(spec=spec(name, range(4)), leg=Leg.DECODE, has_partner=False, outputs=(), ended=None)


def test_an_expected_worker_is_admitted_once_and_found_by_its_key(sessions: WorkerSessions[str]) -> None:
    assert sessions.received("a", HELLO) == []
    assert sessions.connection(KEY) == "a" and sessions.num_unproven == 0
    sessions.opened("b")
    refused, hang_up = sessions.received("b", HELLO)
    assert isinstance(refused, Refused) and not refused.is_harmless and hang_up == HangUp("b")
    assert sessions.connection(KEY) == "a"


@pytest.mark.parametrize("message", [Hello(worker_id="decode-0", incarnation=2), REPORT, READY])
def test_an_unexpected_or_unauthenticated_peer_is_refused(
    sessions: WorkerSessions[str], message: Hello | StepReport | Ready
) -> None:
    refused, hang_up = sessions.received("a", message)
    assert isinstance(refused, Refused) and hang_up == HangUp("a")
    assert refused.is_harmless == isinstance(message, Hello), "it has the token, and is to end: no alarm"
    assert sessions.received("a", HELLO) == [], "what it says after that does not count"
    assert sessions.closed("a", None) == [], "its refusal was counted already"
    assert sessions.num_refused == 1 and sessions.num_unproven == 0


def test_a_host_that_only_tests_the_connection_is_a_probe(sessions: WorkerSessions[str]) -> None:
    (refused,) = sessions.closed("a", None)
    assert isinstance(refused, Refused) and refused.is_harmless
    sessions.opened("b")
    sessions.heard("b")
    (refused,) = sessions.closed("b", None)
    assert isinstance(refused, Refused) and not refused.is_harmless


def test_a_workers_held_legs_are_reported_as_a_whole(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    assert sessions.received("a", Holds(held=(held("x"), held("y")))) == []
    ready = WorkerReady(READY.info, (held("x"), held("y"), held("z")))
    assert sessions.received("a", Ready(info=READY.info, held=(held("z"),))) == [
        ToRouter(ready),
        ToSupervisor(ready),
    ]


def test_progress_is_for_the_supervisor_and_reports_are_for_the_router(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    progress = LoadProgress(worker_id="decode-0", incarnation=1, phase="loading", fraction=0.5)
    assert sessions.received("a", progress) == [ToSupervisor(WorkerProgress("decode-0", 1, "loading", 0.5))]
    assert sessions.received("a", REPORT) == [ToRouter(REPORT)]
    full = HostFull(worker_id="decode-0", incarnation=1, full=(("/tmp", 1 << 30),))
    assert sessions.received("a", full) == [ToSupervisor(full)]


def test_a_worker_that_is_to_end_does_not_become_ready() -> None:
    expected = {KEY}
    sessions: WorkerSessions[str] = WorkerSessions(expected.__contains__)
    sessions.opened("a")
    sessions.received("a", HELLO)
    expected.clear()
    assert sessions.received("a", READY) == []


def test_a_ready_worker_that_falls_silent_is_disconnected_and_lost(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    for _ in range(MAX_SILENT_BEATS):
        assert sessions.beat("a") == [Say("a", Heartbeat())]
    assert sessions.beat("a") == [HangUp("a")]
    assert sessions.beat("a") == []
    lost = [ToRouter(WorkerLost(*KEY, SILENT)), ToSupervisor(ConnectionLost(*KEY, SILENT, is_silent=True))]
    assert sessions.closed("a", None) == lost
    assert sessions.connection(KEY) is None


def test_a_connection_that_the_worker_ends_leaves_the_cause_open(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    assert ToRouter(WorkerLost(*KEY, "reset", LossCause.UNKNOWN)) in sessions.closed("a", "reset")


def test_any_input_breaks_a_workers_silence_but_not_an_unproven_peers(
    sessions: WorkerSessions[str],
) -> None:
    sessions.opened("worker")
    sessions.received("worker", HELLO)
    sessions.received("worker", READY)
    for _ in range(MAX_SILENT_BEATS):
        for connection in ("a", "worker"):
            sessions.heard(connection)
            assert HangUp(connection) not in sessions.beat(connection)
    assert HangUp("a") in sessions.beat("a")
    assert HangUp("worker") not in sessions.beat("worker")


def test_a_worker_that_loads_may_be_silent(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    for _ in range(10 * MAX_SILENT_BEATS):
        assert sessions.beat("a") == [Say("a", Heartbeat())]


def test_excess_unproven_peers_are_dropped_oldest_first_and_workers_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_sessions, "MAX_UNPROVEN", 2)
    sessions: WorkerSessions[str] = WorkerSessions(lambda key: True)
    sessions.opened("worker")
    sessions.received("worker", HELLO)
    assert sessions.opened("a") == sessions.opened("b") == []
    refused, hang_up = sessions.opened("c")
    assert isinstance(refused, Refused) and hang_up == HangUp("a")
    assert sessions.num_unproven == 2
