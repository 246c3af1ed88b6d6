"""The timeline of a request, as `explain`, traces and metrics show it."""

from .events import DispatchTimes, Timeline
from .live_request import Dispatch, DispatchState, LiveRequest


def timeline_of(live: LiveRequest, now_s: float) -> Timeline:
    """Returns where the time of a request went, until `now_s` if it has not ended."""
    return Timeline(
        request_id=live.request_id,
        submitted_s=live.submitted_s,
        first_token_s=live.first_token_s,
        ended_s=now_s if live.ended_s is None else live.ended_s,
        dispatches=tuple(_times(dispatch, attempt) for attempt, dispatch in enumerate(live.dispatches)),
        finish_reasons=tuple(stream.finish_reason for stream in live.streams),
        error=live.error,
        num_prompt_tokens=live.num_prompt_tokens,
        num_output_tokens=tuple(len(stream.token_ids) for stream in live.streams),
        client=live.request.client,
        user=live.request.user,
        traceparent=live.request.traceparent,
        num_times_unread=live.num_times_unread,
        is_adopted=live.held is not None,
    )


def _times(dispatch: Dispatch, attempt: int) -> DispatchTimes:
    """Returns the row of the request's timeline for this dispatch, as this router's attempt number
    `attempt`."""
    placement = dispatch.placement
    assert placement is not None, f"{dispatch.transfer} was never booked"
    ended_s, num_steps = dispatch.ended_s, dispatch.num_steps
    if dispatch.failure is None:
        num_steps = dispatch.count_steps()
        if dispatch.state is DispatchState.FINISHED:
            ended_s = max(
                (s.last_token_s for s in dispatch.streams.values() if s.last_token_s is not None),
                default=None,
            )
    return DispatchTimes(
        attempt=attempt,
        number=dispatch.transfer.attempt,
        choices=dispatch.spec.choices,
        prefill_worker=dispatch.prefill.worker_id,
        decode_worker=dispatch.decode.worker_id if dispatch.decode else None,
        num_tokens=dispatch.spec.num_tokens,
        expected_cached_tokens=placement.num_cached_tokens,
        expected_ttft_s=placement.ttft_s,
        expected_queue_s=placement.queue_s,
        expected_transfer_s=placement.transfer_s,
        expected_itl_s=placement.itl_s,
        considered=placement.considered(),
        queued_s=dispatch.job.queued_s,
        dispatched_s=dispatch.dispatched_s,
        first_token_s=dispatch.first_token_s,
        ended_s=ended_s,
        num_steps=num_steps,
        failure=dispatch.failure,
        prefill=dispatch.prefill_ended,
        decode=dispatch.decode_ended,
    )
