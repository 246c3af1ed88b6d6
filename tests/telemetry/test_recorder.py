"""The memory of past requests is bounded, and recording requests never ends them."""

import logging

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.core.messages import Leg, LegEnded
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.events import ConsideredPlace, DispatchTimes, Tick, Timeline
from pdserve.telemetry.recent import RecentRequests
from pdserve.telemetry.recorder import TelemetryRecorder
from pdserve.telemetry.request_log import RequestLog

from .support import STATS, Watched


def timeline(
    request_id: str = "r", num_dispatches: int = 1, failure: str | None = None, **fields: object
) -> Timeline:
    ended = LegEnded(
        worker_id="prefill-0",
        incarnation=1,
        transfer=TransferId(request_id, 7),
        leg=Leg.PREFILL,
        queue_s=0.1,
        stats=STATS,
    )
    place = ConsideredPlace(
        prefill_worker="prefill-0",
        decode_worker=None,
        has_failed=False,
        itl_excess_s=0.0,
        cost_s=1.0,
        load=0.5,
        ttft_s=1.0,
    )
    dispatch = DispatchTimes(
        attempt=0,
        number=7,
        choices=(0,),
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        num_tokens=10,
        expected_cached_tokens=0,
        expected_ttft_s=0.1,
        considered=(place,),
        queued_s=1.0,
        dispatched_s=1.0,
        first_token_s=2.0,
        failure=failure,
        prefill=ended,
    )
    values: dict[str, object] = {
        "request_id": request_id,
        "submitted_s": 1.0,
        "first_token_s": 2.0,
        "ended_s": 3.0,
        "dispatches": (dispatch,) * num_dispatches,
        "finish_reasons": (FinishReason.LENGTH,),
    }
    return Timeline(**values | fields)  # type: ignore[arg-type]


def test_a_recent_request_comes_back_as_it_was() -> None:
    recent = RecentRequests()
    recent.add(timeline("one"))
    assert recent.get("one") == timeline("one")
    assert recent.get("two") is None


def test_a_reused_id_refers_to_its_last_request() -> None:
    recent = RecentRequests()
    recent.add(timeline("again", ended_s=3.0))
    recent.add(timeline("again", ended_s=4.0))
    last = recent.get("again")
    assert last is not None
    assert last.ended_s == 4.0
    assert len(recent) == 1


def test_the_latest_requests_of_a_scope_are_listed_the_last_first() -> None:
    recent = RecentRequests()
    for name in ("alice/1", "bob/1", "alice/2", "alice/3", "alice/1"):
        recent.add(timeline(name))
    assert [one.request_id for one in recent.latest(2, "alice/")] == ["alice/1", "alice/3"]
    assert [one.request_id for one in recent.latest(9)] == ["alice/1", "alice/3", "alice/2", "bob/1"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), max_size=60))
def test_neither_many_requests_nor_long_ones_take_more_than_the_bounds(
    requests: list[tuple[int, int]],
) -> None:
    recent = RecentRequests(max_requests=8, max_bytes=8000)
    for number, num_dispatches in requests:
        recent.add(timeline(f"r{number}", num_dispatches))
        assert len(recent) <= 8
        assert recent.num_bytes <= 8000
        assert recent.num_bytes == sum(map(len, recent._packed.values()))
        newest = recent.get(f"r{number}")
        assert newest is not None or num_dispatches > 10, "only what is too large by itself is not remembered"


class Recorded:
    """A recorder, with the traces it exported."""

    def __init__(self) -> None:
        self.num_spans = 0
        self.exported: list[tuple[str, float]] = []
        watched = Watched("prefill-0")
        requests = RequestLog(10.0, lambda: 42.0)
        self.recorder = TelemetryRecorder(
            watched.tally, watched.steps, RecentRequests(), self, requests, lambda: 42.0
        )

    def export(self, timeline: Timeline, now_s: float) -> None:
        self.exported.append((timeline.request_id, now_s))

    def close(self) -> None:
        pass


def test_a_closed_request_is_counted_remembered_and_exported() -> None:
    recorded = Recorded()
    recorded.recorder.closed(timeline("one"))
    assert recorded.recorder.tally.counts["request_success_total", ("length",)] == 1
    assert recorded.recorder.recent.get("one") is not None
    assert recorded.exported == [("one", 42.0)]


def test_a_recording_error_is_logged_with_its_request_and_contained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorded = Recorded()
    recorded.recorder.closed(timeline("unfinished", finish_reasons=(None,)))
    (record,) = caplog.records
    assert (record.levelname, record.__dict__["request_id"]) == ("ERROR", "unfinished")
    recorded.recorder.steps.observe = None  # type: ignore[assignment]
    recorded.recorder.observe(Tick())
    assert len(caplog.records) == 2


def test_each_failed_attempt_is_a_line_with_its_number_and_worker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pdserve")
    Recorded().recorder.closed(timeline("one", failure="decode-0: killed"))
    fields = caplog.records[0].__dict__
    assert (fields["request_id"], fields["attempt"], fields["worker"]) == ("one", 7, "decode-0")
