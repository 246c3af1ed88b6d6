"""The router's account of a request as clients get it: instants relative to its start, one attempt after the
other."""

from ..core.messages import LegEnded
from ..proto import pdserve_pb2 as pb
from ..router.events import DispatchTimes, Timeline


def num_cached_tokens(timeline: Timeline) -> int:
    """Returns how many tokens of the prompt came from a prefix cache at the first attempt."""
    if not timeline.dispatches:
        return 0
    first = timeline.dispatches[0]
    return first.expected_cached_tokens if first.prefill is None else first.prefill.num_cached_tokens


def timeline_message(timeline: Timeline) -> pb.Timeline:
    start_s = timeline.submitted_s
    dispatches = timeline.dispatches
    ends_s = [following.queued_s for following in dispatches[1:]] + [timeline.ended_s]
    return pb.Timeline(
        first_token_s=None if timeline.first_token_s is None else timeline.first_token_s - start_s,
        ended_s=timeline.ended_s - start_s,
        attempts=[
            _attempt(dispatch, start_s, end_s) for dispatch, end_s in zip(dispatches, ends_s, strict=True)
        ],
    )


def _attempt(dispatch: DispatchTimes, start_s: float, end_s: float) -> pb.Attempt:
    first_s = dispatch.first_token_s
    attempt = pb.Attempt(
        attempt=dispatch.attempt,
        choices=dispatch.choices,
        queued_s=dispatch.queued_s - start_s,
        dispatched_s=dispatch.dispatched_s - start_s,
        first_token_s=None if first_s is None else first_s - start_s,
        expected_ttft_s=dispatch.expected_ttft_s,
        prefill=_prefill(dispatch),
        transfer=_transfer(dispatch.prefill),
    )
    if dispatch.decode_worker is not None and first_s is not None:
        attempt.decode.CopyFrom(
            pb.DecodeLeg(worker=dispatch.decode_worker, duration_s=max(end_s - first_s, 0.0))
        )
    return attempt


def _prefill(dispatch: DispatchTimes) -> pb.PrefillLeg:
    leg = pb.PrefillLeg(worker=dispatch.prefill_worker, num_tokens=dispatch.num_tokens)
    if dispatch.prefill is not None:
        leg.num_cached_tokens = dispatch.prefill.num_cached_tokens
        leg.queue_s = dispatch.prefill.queue_s
        leg.compute_s = dispatch.prefill.compute_s
    return leg


def _transfer(prefill: LegEnded | None) -> pb.TransferLeg | None:
    stats = None if prefill is None else prefill.stats
    if stats is None:
        return None
    return pb.TransferLeg(
        num_bytes=stats.num_bytes,
        num_chunks=stats.num_chunks,
        duration_s=stats.duration_s,
        exposed_s=stats.exposed_s,
        hidden_share=stats.hidden_bytes / stats.num_bytes if stats.num_bytes else 1.0,
    )
