"""Collects all events of requests: the router's shell calls it, nothing waits for it."""

import logging
from collections.abc import Callable
from typing import Protocol

from ..router.events import RouterEvent, Timeline
from .recent import RecentRequests
from .request_log import RequestLog
from .steps import StepTally
from .tally import Tally

log = logging.getLogger(__name__)


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
        requests: RequestLog,
        clock: Callable[[], float],
    ) -> None:
        self.tally = tally
        self.steps = steps
        self.recent = recent
        self.traces = traces
        self.requests = requests
        self.listener: Callable[[Timeline], object] = lambda timeline: None
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
            self.requests.closed(timeline)
            self.listener(timeline)
        except Exception:  # telling of requests must not end them
            log.exception("a request could not be recorded", extra={"request_id": timeline.request_id})
