"""The durations of a dispatch's legs, by the router's clock and the workers' reports. None: not known, or
no such leg."""

from ..core.messages import LegEnded
from ..router.events import DispatchTimes, Timeline


def account(dispatch: DispatchTimes) -> LegEnded | None:
    """The report of the worker that computed the prompt."""
    return dispatch.decode if dispatch.decode_worker == dispatch.prefill_worker else dispatch.prefill


def prefill_s(dispatch: DispatchTimes) -> float | None:
    """The time from the first step of the prompt to its last. One worker's report of both phases gives only
    their sum."""
    if dispatch.prefill is not None:
        return dispatch.prefill.compute_s
    report = account(dispatch)
    if report is None or dispatch.first_token_s is None:
        return None
    return max(0.0, dispatch.first_token_s - dispatch.dispatched_s - report.queue_s)


def kv_wait_s(dispatch: DispatchTimes) -> float | None:
    """The time from the first token until the decode worker had the KV. Its leg waits from dispatch on."""
    prefill, decode = dispatch.prefill, dispatch.decode
    if (
        prefill is None
        or prefill.stats is None
        or decode is None
        or decode.error is not None
        or dispatch.first_token_s is None
    ):
        return None
    return max(0.0, dispatch.dispatched_s + decode.queue_s - dispatch.first_token_s)


def decode_s(dispatch: DispatchTimes) -> float | None:
    """The time from the first token of this dispatch to its last."""
    if dispatch.decode_worker is None or dispatch.first_token_s is None or dispatch.ended_s is None:
        return None
    return max(0.0, dispatch.ended_s - dispatch.first_token_s)


def gap_s(dispatch: DispatchTimes) -> float | None:
    """The mean gap between two tokens."""
    seconds = decode_s(dispatch)
    return None if seconds is None or dispatch.num_steps < 2 else seconds / (dispatch.num_steps - 1)


def request_gap_s(timeline: Timeline) -> float | None:
    """The mean gap between two tokens of the longest choice."""
    num_steps = max(timeline.num_output_tokens)
    if timeline.first_token_s is None or num_steps < 2:
        return None
    return (timeline.ended_s - timeline.first_token_s) / (num_steps - 1)
