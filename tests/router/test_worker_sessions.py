"""Connections to the workers' port, without a socket: admission, readiness and loss of workers."""

import pytest

from pdserve.core.messages import (
    Failing,
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
from pdserve.router.events import LossCause, WorkerAway, WorkerLost, WorkerReady
from pdserve.router.supervisor import ConnectionLost, WorkerProgress
from pdserve.router.worker_sessions import (
    CLOSED,
    MAX_SILENT_BEATS,
    REPLACED,
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
    assert sessions.opened("a", 0.0) == []
    return sessions


def held(name: str) -> HeldLeg:
    return HeldLeg.of(spec(name, range(4)), Leg.DECODE, has_partner=False)


def test_an_expected_worker_is_admitted_and_found_by_its_key(sessions: WorkerSessions[str]) -> None:
    assert sessions.received("a", HELLO) == []
    assert sessions.connection(KEY) == "a" and sessions.num_unproven == 0


def test_a_worker_that_connects_again_is_away_until_it_is_ready_there(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    sessions.opened("b", 1.0)
    assert sessions.received("b", HELLO) == [
        HangUp("a"),
        ToRouter(WorkerAway(*KEY)),
        ToSupervisor(ConnectionLost(*KEY, REPLACED, comes_back=True)),
    ]
    assert sessions.connection(KEY) == "b"
    assert sessions.received("a", REPORT) == [], "what the broken connection still brings does not count"
    assert sessions.closed("a", "reset", 1.0) == []
    assert ToRouter(WorkerReady(READY.info)) in sessions.received("b", READY)
    assert sessions.num_refused == 0


def test_a_loading_worker_that_connects_again_goes_on_loading(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.opened("b", 1.0)
    assert sessions.received("b", HELLO) == [HangUp("a")]
    assert sessions.closed("a", None, 1.0) == []
    assert sessions.connection(KEY) == "b"


def test_a_worker_on_which_we_hung_up_does_not_escape_its_loss(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    sessions.hang_up("a", "broken frame")
    sessions.opened("b", 1.0)
    assert HangUp("b") in sessions.received("b", HELLO)
    assert ToRouter(WorkerLost(*KEY, "broken frame", LossCause.GONE)) in sessions.closed("a", None, 1.0)


def test_a_replaced_connection_may_be_closed_after_the_one_that_replaced_it(
    sessions: WorkerSessions[str],
) -> None:
    sessions.received("a", HELLO)
    sessions.opened("b", 1.0)
    sessions.received("b", HELLO)
    lost = ToRouter(WorkerLost(*KEY, "reset", LossCause.UNKNOWN))
    assert lost in sessions.closed("b", "reset", 1.0)
    assert sessions.closed("a", None, 2.0) == []
    assert sessions.connection(KEY) is None


@pytest.mark.parametrize("message", [Hello(worker_id="decode-0", incarnation=2), REPORT, READY])
def test_an_unexpected_or_unauthenticated_peer_is_refused(
    sessions: WorkerSessions[str], message: Hello | StepReport | Ready
) -> None:
    refused, hang_up, *told = sessions.received("a", message)
    assert isinstance(refused, Refused) and hang_up == HangUp("a")
    lives = [ToRouter(WorkerLost("decode-0", 2, "its connection broke", LossCause.GONE))]
    assert told == (lives if isinstance(message, Hello) else []), "a process that dials has not died"
    assert refused.is_harmless == isinstance(message, Hello), "it has the token, and is to end: no alarm"
    assert sessions.received("a", HELLO) == [], "what it says after that does not count"
    assert sessions.closed("a", None, 0.0) == [], "its refusal was counted already"
    assert sessions.num_refused == 1 and sessions.num_unproven == 0


def test_a_host_that_only_tests_the_connection_is_a_probe(sessions: WorkerSessions[str]) -> None:
    (refused,) = sessions.closed("a", None, 0.0)
    assert isinstance(refused, Refused) and refused.is_harmless
    sessions.opened("b", 0.0)
    sessions.heard("b")
    (refused,) = sessions.closed("b", None, 0.0)
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
    sessions.opened("a", 0.0)
    sessions.received("a", HELLO)
    expected.clear()
    assert sessions.received("a", READY) == []


def test_a_ready_worker_that_falls_silent_is_disconnected_and_lost(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    for _ in range(MAX_SILENT_BEATS):
        assert sessions.beat("a", 0.0) == [Say("a", Heartbeat())]
    assert sessions.beat("a", 0.0) == [HangUp("a")]
    assert sessions.beat("a", 0.0) == []
    lost = [ToRouter(WorkerLost(*KEY, SILENT)), ToSupervisor(ConnectionLost(*KEY, SILENT, is_silent=True))]
    assert sessions.closed("a", None, 0.0) == lost
    assert sessions.connection(KEY) is None


def test_a_worker_lost_to_our_own_standstill_is_away(
    sessions: WorkerSessions[str],
) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    sessions.beat("a", 100.0)
    assert sessions.closed("a", None, 110.1) == [
        ToRouter(WorkerAway(*KEY)),
        ToSupervisor(ConnectionLost(*KEY, CLOSED, comes_back=True)),
    ]
    sessions.opened("b", 110.2)
    assert sessions.received("b", HELLO) == []
    assert ToRouter(WorkerReady(READY.info)) in sessions.received("b", READY)


@pytest.mark.parametrize("beat_s", [0.5, 6.5])  # moving again, or still in long turns
@pytest.mark.parametrize(
    ("num_beats", "is_away"), [(0, True), (MAX_SILENT_BEATS - 1, True), (MAX_SILENT_BEATS, False)]
)
def test_a_worker_may_hang_up_when_we_have_just_moved_again(
    sessions: WorkerSessions[str], beat_s: float, num_beats: int, is_away: bool
) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    now_s = 110.0
    sessions.beat("a", 100.0)
    sessions.beat("a", now_s)
    for _ in range(num_beats):
        now_s += beat_s
        sessions.heard("a")
        sessions.beat("a", now_s)
    event = WorkerAway(*KEY) if is_away else WorkerLost(*KEY, CLOSED, LossCause.UNKNOWN)
    assert sessions.closed("a", None, now_s)[0] == ToRouter(event)


def test_a_worker_that_reports_its_failure_is_lost_for_that_reason(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    failing = Failing(worker_id="decode-0", incarnation=1, reason="a step has taken 20 s")
    assert sessions.received("a", failing) == [HangUp("a")]
    assert sessions.closed("a", None, 0.0) == [
        ToRouter(WorkerLost(*KEY, failing.reason, LossCause.DIED)),
        ToSupervisor(ConnectionLost(*KEY, failing.reason)),
    ]


def test_a_connection_that_the_worker_ends_leaves_the_cause_open(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    sessions.received("a", READY)
    assert ToRouter(WorkerLost(*KEY, "reset", LossCause.UNKNOWN)) in sessions.closed("a", "reset", 0.0)


def test_any_input_breaks_a_workers_silence_but_not_an_unproven_peers(
    sessions: WorkerSessions[str],
) -> None:
    sessions.opened("worker", 0.0)
    sessions.received("worker", HELLO)
    sessions.received("worker", READY)
    for _ in range(MAX_SILENT_BEATS):
        for connection in ("a", "worker"):
            sessions.heard(connection)
            assert HangUp(connection) not in sessions.beat(connection, 0.0)
    assert HangUp("a") in sessions.beat("a", 0.0)
    assert HangUp("worker") not in sessions.beat("worker", 0.0)


def test_a_worker_that_loads_may_be_silent(sessions: WorkerSessions[str]) -> None:
    sessions.received("a", HELLO)
    for _ in range(10 * MAX_SILENT_BEATS):
        assert sessions.beat("a", 0.0) == [Say("a", Heartbeat())]


def test_excess_unproven_peers_are_dropped_oldest_first_and_workers_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_sessions, "MAX_UNPROVEN", 2)
    sessions: WorkerSessions[str] = WorkerSessions(lambda key: True)
    sessions.opened("worker", 0.0)
    sessions.received("worker", HELLO)
    assert sessions.opened("a", 0.0) == sessions.opened("b", 0.0) == []
    refused, hang_up = sessions.opened("c", 0.0)
    assert isinstance(refused, Refused) and hang_up == HangUp("a")
    assert sessions.num_unproven == 2
