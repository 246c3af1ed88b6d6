"""A line in the log for each request at its end: who asked, how much, how it ended, how long it took and
where; and one for each attempt that failed. Nothing of a prompt or an output is in them."""

import logging
from collections.abc import Callable, Mapping

from ..core.peer_log import LineBudget
from ..core.request import FinishReason
from ..router.events import Timeline
from . import legs

log = logging.getLogger(__name__)

LEVELS: Mapping[FinishReason, int] = {
    FinishReason.ERROR: logging.WARNING,
    FinishReason.FATAL: logging.ERROR,
}
FAULTS = (FinishReason.ERROR, FinishReason.FATAL, FinishReason.DEADLINE, FinishReason.INVALID)
FAULT_LINES_PER_S = 10.0


class RequestLog:
    """Logs at most `lines_per_s` requests a second, none for 0. Those that went wrong, and failed attempts,
    have budgets of their own, as the others could use it up. A line states how many were left out before
    it."""

    def __init__(self, lines_per_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._faults = LineBudget(FAULT_LINES_PER_S, FAULT_LINES_PER_S)
        self._attempts = LineBudget(FAULT_LINES_PER_S, FAULT_LINES_PER_S)
        self._others = LineBudget(max(1.0, lines_per_s), lines_per_s) if lines_per_s else None

    def closed(self, timeline: Timeline) -> None:
        outcome = timeline.outcome
        assert outcome is not None
        self._log_failed_attempts(timeline)
        budget = self._faults if outcome in FAULTS else self._others
        level = LEVELS.get(outcome, logging.INFO)
        if budget is None or not log.isEnabledFor(level):
            return
        num_left_out = budget.take(self._clock())
        if num_left_out is not None:
            text = f"request ended: {timeline.error}" if timeline.error else "request ended"
            log.log(level, "%s", text, extra=fields(timeline, num_left_out))

    def _log_failed_attempts(self, timeline: Timeline) -> None:
        for dispatch in timeline.dispatches:
            if dispatch.failure is None or not log.isEnabledFor(logging.INFO):
                continue
            num_left_out = self._attempts.take(self._clock())
            if num_left_out is None:
                continue
            where = {
                "request_id": timeline.request_id,
                "attempt": dispatch.number,
                "worker": dispatch.decode_worker,
            }
            left_out = {"num_left_out": num_left_out} if num_left_out else {}
            log.info("an attempt failed: %s", dispatch.failure, extra=where | left_out)


def fields(timeline: Timeline, num_left_out: int = 0) -> dict[str, object]:
    """Returns the fields of a request's line; those that are not known are left out."""
    last = timeline.dispatches[-1] if timeline.dispatches else None
    account = None if not timeline.dispatches else legs.account(timeline.dispatches[0])
    first_s = timeline.first_token_s
    values: dict[str, object] = {
        "request_id": timeline.request_id,
        "client": timeline.client or None,
        "prompt_tokens": timeline.num_prompt_tokens,
        "cached_tokens": None if account is None else account.num_cached_tokens,
        "output_tokens": sum(timeline.num_output_tokens),
        "finish_reason": None if timeline.outcome is None else timeline.outcome.value,
        "ttft_ms": None if first_s is None else round((first_s - timeline.submitted_s) * 1e3, 1),
        "duration_ms": round((timeline.ended_s - timeline.submitted_s) * 1e3, 1),
        "prefill_worker": None if last is None else last.prefill_worker,
        "decode_worker": None if last is None else last.decode_worker,
        "num_attempts": len(timeline.dispatches) if len(timeline.dispatches) > 1 else None,
        "num_left_out": num_left_out or None,
    }
    return {name: value for name, value in values.items() if value is not None}
