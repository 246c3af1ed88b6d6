"""Lines that unauthenticated peers cause: one budget for all of them, and no line is lost without being
counted."""

import logging

import pytest
from hypothesis import given, strategies as st

from pdserve.core.peer_log import BURST_LINES, LINES_PER_S, LineBudget, RateLimit


def test_a_burst_passes_and_then_one_line_a_second() -> None:
    budget = LineBudget()
    passed = [budget.take(0.0) for _ in range(BURST_LINES + 1000)]
    assert passed[:BURST_LINES] == [0] * BURST_LINES
    assert set(passed[BURST_LINES:]) == {None}
    assert budget.take(1.0 / LINES_PER_S) == 1000
    assert budget.take(1.0 / LINES_PER_S) is None


@given(st.lists(st.floats(0, 1e6), max_size=200))
def test_passed_and_suppressed_lines_add_up_to_all(times: list[float]) -> None:
    """This holds even when the clock goes back."""
    budget = LineBudget()
    taken = [budget.take(now_s) for now_s in times]
    passed = [count for count in taken if count is not None]
    last = budget.take(max(times, default=0.0) + 1e9)
    assert last is not None and len(passed) + sum(passed) + last == len(times)


def test_loggers_share_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    limit = RateLimit(LineBudget())
    loggers = [logging.getLogger(f"limited.{name}") for name in "ab"]
    for logger in loggers:
        logger.addFilter(limit)
    with caplog.at_level(logging.WARNING):
        for index in range(500):
            loggers[index % 2].warning("refused %s", "a peer")
    assert BURST_LINES <= len(caplog.records) < BURST_LINES + 10
