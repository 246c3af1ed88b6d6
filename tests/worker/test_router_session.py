"""A worker's side of its connections with routers, without a socket or a clock."""

from pdserve.core.messages import HeldLeg, Holds, Leg, Ready, Role
from pdserve.worker.held_legs import LEG_TOKENS
from pdserve.worker.router_session import (
    BRIEF_S,
    DEAD_AFTER_S,
    ROUTER_LOST_TIMEOUT_S,
    RouterSession,
    RouterSilence,
)

from ..router.cluster import worker_info
from .chain_model import spec

INFO = worker_info("decode-0", Role.DECODE)


def session(max_frame_tokens: int = 1000) -> RouterSession:
    """A worker that starts at 100 s."""
    return RouterSession("decode-0", 1, 100.0, max_frame_tokens)


def held(name: str) -> HeldLeg:
    return HeldLeg.of(spec(name, range(4)), Leg.DECODE, has_partner=False)


def test_a_worker_dials_until_no_router_answered_for_too_long() -> None:
    worker = session()
    assert worker.may_dial(100.0 + ROUTER_LOST_TIMEOUT_S - 0.1)
    assert not worker.may_dial(100.0 + ROUTER_LOST_TIMEOUT_S)


def test_the_timeout_restarts_when_a_router_is_lost() -> None:
    worker = session()
    worker.connected(101.0)
    worker.lost(200.0)
    assert worker.may_dial(200.0 + ROUTER_LOST_TIMEOUT_S - 0.1)
    assert not worker.may_dial(200.0 + ROUTER_LOST_TIMEOUT_S)


def test_a_router_that_refuses_at_once_does_not_count() -> None:
    worker = session()
    for now_s in range(101, 100 + int(ROUTER_LOST_TIMEOUT_S)):
        assert worker.may_dial(now_s)
        worker.connected(now_s)
        worker.lost(now_s + BRIEF_S / 2)
    assert not worker.may_dial(100.0 + ROUTER_LOST_TIMEOUT_S)


def test_a_silent_router_is_lost_after_a_while() -> None:
    silence = RouterSilence(100.0)
    assert not silence.is_lost(100.0 + DEAD_AFTER_S)
    silence.heard(105.0)
    assert not silence.is_lost(105.0 + DEAD_AFTER_S)
    assert silence.is_lost(105.1 + DEAD_AFTER_S)


def test_a_router_reached_while_weights_load_receives_the_progress() -> None:
    worker = session()
    assert worker.catch_up() is None, "nothing was reported"
    last = worker.progress("loading weights", 0.5)
    assert worker.catch_up() == last
    worker.loaded()
    assert worker.catch_up() is None, "a greeting says more"


def test_each_router_is_greeted_once_with_all_that_the_worker_holds() -> None:
    worker = session()
    legs = [held("a"), held("b")]
    assert worker.greeting("first", INFO, legs, 7) == [
        Ready(info=INFO, held=tuple(legs), num_cached_blocks=7)
    ]
    assert worker.greeting("first", INFO, legs, 7) == []
    assert worker.greeting("second", INFO, [], 0) == [Ready(info=INFO)]


def test_legs_that_exceed_a_frame_are_reported_before_ready() -> None:
    a, b, c = held("a"), held("b"), held("c")
    greeting = session(max_frame_tokens=2 * LEG_TOKENS).greeting("router", INFO, [a, b, c], 0)
    assert greeting == [Holds(held=(a, b)), Ready(info=INFO, held=(c,))]
