"""Each request has a line at its end, up to a rate; what went wrong is never crowded out."""

import logging

import pytest

from pdserve.core.request import FinishReason
from pdserve.telemetry.logs import ConsoleFormatter
from pdserve.telemetry.request_log import FAULT_LINES_PER_S, RequestLog

from .test_recorder import timeline


class Now:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pdserve")


def test_a_line_says_who_asked_how_much_how_it_ended_and_where(caplog: pytest.LogCaptureFixture) -> None:
    ended = timeline("r7", client="key:alice", num_prompt_tokens=19, num_output_tokens=(4, 6))
    RequestLog(1.0, Now()).closed(ended)
    (record,) = caplog.records
    line = ConsoleFormatter("head").format(record)
    assert record.levelname == "INFO"
    assert line.endswith(
        "request ended request_id=r7 client=key:alice prompt_tokens=19 cached_tokens=0 output_tokens=10"
        " finish_reason=length ttft_ms=1000.0 duration_ms=2000.0 prefill_worker=prefill-0"
        " decode_worker=decode-0"
    )


def test_what_is_not_known_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    reasons = (FinishReason.CANCELLED,)
    RequestLog(1.0, Now()).closed(timeline(dispatches=(), first_token_s=None, finish_reasons=reasons))
    fields = caplog.records[0].__dict__
    assert fields["finish_reason"] == "cancelled"
    assert not {"client", "cached_tokens", "ttft_ms", "prefill_worker", "num_left_out"} & set(fields)


def test_above_the_rate_requests_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Now()
    log = RequestLog(2.0, clock)
    for _ in range(7):
        log.closed(timeline())
    assert len(caplog.records) == 2
    clock.now_s = 0.5
    log.closed(timeline())
    assert [record.__dict__.get("num_left_out") for record in caplog.records] == [None, None, 5]


def test_faults_have_a_budget_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(1.0, Now())
    for _ in range(100):
        log.closed(timeline())
    broken = timeline(finish_reasons=(FinishReason.ERROR,), error="decode-0: killed")
    for _ in range(100):
        log.closed(broken)
    faults = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(faults) == FAULT_LINES_PER_S
    assert faults[0].getMessage() == "request ended: decode-0: killed"


@pytest.mark.parametrize(
    ("reason", "num_lines"),
    [
        (FinishReason.LENGTH, 0),
        (FinishReason.CANCELLED, 0),
        (FinishReason.DEADLINE, 1),
        (FinishReason.ERROR, 1),
    ],
)
def test_with_a_rate_of_zero_only_faults_have_a_line(
    reason: FinishReason, num_lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    RequestLog(0.0, Now()).closed(timeline(finish_reasons=(reason,)))
    assert len(caplog.records) == num_lines


def test_failed_attempts_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = Now()
    log = RequestLog(1.0, clock)
    failed = timeline(num_dispatches=3, failure="decode-0: killed")
    for _ in range(100):
        log.closed(failed)
    clock.now_s = 0.1
    log.closed(failed)
    attempts = [record for record in caplog.records if "an attempt failed" in record.getMessage()]
    assert len(attempts) == FAULT_LINES_PER_S + 1
    assert attempts[-1].__dict__["num_left_out"] == 300 - FAULT_LINES_PER_S
