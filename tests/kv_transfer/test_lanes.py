"""Lanes: order within one, and threads shared by all."""

import threading
from collections.abc import Iterator

import pytest

from pdserve.kv_transfer.lanes import Lanes

from .support import WAIT_S


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes("pdserve-link")
    yield made
    made.close()


def test_calls_of_a_lane_run_one_at_a_time_in_order(lanes: Lanes) -> None:
    lane, seen, gate = lanes.lane(), list[int](), threading.Event()
    futures = [lane.submit(gate.wait, WAIT_S), *(lane.submit(seen.append, number) for number in range(20))]
    assert seen == []
    gate.set()
    futures[-1].result(WAIT_S)
    assert seen == list(range(20))


def test_a_blocked_lane_delays_no_other(lanes: Lanes) -> None:
    gate = threading.Event()
    blocked = [lanes.lane().submit(gate.wait, WAIT_S) for _ in range(50)]
    assert lanes.lane().submit(lambda: "done").result(WAIT_S) == "done"
    gate.set()
    assert all(each.result(WAIT_S) for each in blocked)


def test_lanes_that_are_not_busy_at_once_share_one_thread(lanes: Lanes) -> None:
    before = set(threading.enumerate())
    for _ in range(50):
        lane = lanes.lane()
        lane.submit(lambda: None).result(WAIT_S)
        lane.shutdown()
    assert len(set(threading.enumerate()) - before) <= 10  # a thread is idle a moment after its result


def test_an_error_is_its_callers_and_the_lane_goes_on(lanes: Lanes) -> None:
    lane = lanes.lane()
    failing = lane.submit(int, "x")
    assert lane.submit(int, "1").result(WAIT_S) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(WAIT_S)


def test_a_shut_lane_finishes_what_it_was_given_and_takes_no_more(lanes: Lanes) -> None:
    lane, seen = lanes.lane(), list[int]()
    lane.submit(seen.append, 1)
    lane.shutdown(wait=True)
    assert seen == [1]
    with pytest.raises(RuntimeError, match="shut down"):
        lane.submit(seen.append, 2)


def test_a_lane_that_gets_no_thread_fails_its_calls_and_not_its_caller() -> None:
    """So it is when the process ends before the endpoint is closed, and links are killed."""
    lanes = Lanes("pdserve-link")
    lane = lanes.lane()
    lanes.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        lane.submit(int).result(WAIT_S)
    lane.shutdown(wait=True)
