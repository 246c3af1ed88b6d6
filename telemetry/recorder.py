"""Collects all events of requests: the router's shell calls it, nothing waits for it."""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from ..core.request import FinishReason
from ..router.events import RouterEvent, Timeline
from .recent import RecentRequests
from .steps import StepTally
from .tally import Tally

log = logging.getLogger(__name__)

LEVELS: Mapping[FinishReason, int] = {
    FinishReason.ERROR: logging.WARNING,
    FinishReason.FATAL: logging.ERROR,
    FinishReason.DEADLINE: logging.INFO,
    FinishReason.INVALID: logging.INFO,
}


class Traces(Protocol):
    """The exporter of spans."""

    num_spans: int  # that were made

    def export(self, timeline: Timeline, now_s: float) -> None: ...
    def close(self) -> None: ...


class TelemetryRecorder:
    """Counts, remembers, exports and logs. An error in here is logged and ends no request."""

    def __init__(
        self,
        tally: Tally,
        steps: StepTally,
        recent: RecentRequests,
        traces: Traces | None,
        clock: Callable[[], float],
    ) -> None:
        self.tally = tally
        self.steps = steps
        self.recent = recent
        self.traces = traces
        self._clock = clock

    def observe(self, event: RouterEvent) -> None:
        """Records an event before the router handles it."""
        try:
            self.steps.observe(event)
        except Exception:  # telling of requests must not end them
            log.exception("an event could not be counted")

    def closed(self, timeline: Timeline) -> None:
        """Records a request for which nothing is held any more."""
        try:
            self.tally.closed(timeline)
            self.recent.add(timeline)
            if self.traces is not None:
                self.traces.export(timeline, self._clock())
            _log_end(timeline)
        except Exception:  # telling of requests must not end them
            log.exception("a request could not be recorded", extra={"request_id": timeline.request_id})


def _log_end(timeline: Timeline) -> None:
    """Every request at debug, those that went wrong above it; each attempt that failed on a line of its
    own."""
    outcome = timeline.outcome
    assert outcome is not None
    for dispatch in timeline.dispatches:
        if dispatch.failure is not None:
            where = {
                "request_id": timeline.request_id,
                "attempt": dispatch.number,
                "worker": dispatch.decode_worker,
            }
            log.info("an attempt failed: %s", dispatch.failure, extra=where)
    level = LEVELS.get(outcome, logging.DEBUG)
    if log.isEnabledFor(level):
        text = "%s after %.3f s, tokens: %d + %d, attempts: %d%s"
        error = f": {timeline.error}" if timeline.error else ""
        seconds, num_output_tokens = timeline.ended_s - timeline.submitted_s, sum(timeline.num_output_tokens)
        values = (
            outcome.value,
            seconds,
            timeline.num_prompt_tokens,
            num_output_tokens,
            len(timeline.dispatches),
            error,
        )
        log.log(level, text, *values, extra={"request_id": timeline.request_id})
