"""Compares a request's timeline with its predictions, for operators."""

from collections.abc import Callable, Iterator

from ..core.errors import InvalidRequest
from ..proto import pdserve_pb2 as pb
from ..router.events import ConsideredPlace, DispatchTimes, Timeline
from ..telemetry import legs
from .auth.access import Access, Caller

_HTTP_PREFIXES = ("chatcmpl-", "cmpl-")  # prefixes of response ids: the request's id follows
MAX_NAMES = 5


def find_timeline(
    known: Callable[[str], Timeline | None], request_id: str, caller: Caller | None, access: Access | None
) -> Timeline | None:
    """Explains the request that an operator, or its client, calls `request_id`. Raises InvalidRequest if
    several have that id.

    Internal ids are scoped by key name. A client finds only its own requests; an administrator finds all, and
    need not know whose a request is."""
    bare = next((request_id[len(start) :] for start in _HTTP_PREFIXES if request_id.startswith(start)), None)
    ids = [request_id] if bare is None else [request_id, bare]
    if caller is not None and not caller.key.is_admin:
        scoped = [caller.scoped(name) for name in ids]
    else:
        scoped = ids + [
            f"{owner}/{name}" for owner in (access.names if access is not None else ()) for name in ids
        ]
    found = [timeline for name in scoped if (timeline := known(name)) is not None]
    exact = [timeline for timeline in found if timeline.request_id == request_id]
    if len(exact or found) > 1:
        names = [timeline.request_id for timeline in found]
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        raise InvalidRequest(
            "request_id", request_id, f"the id of one request, as {', '.join(names[:MAX_NAMES])}{more} has it"
        )
    return next(iter(exact or found), None)


def summary(timeline: Timeline, scope: str, now_s: float) -> pb.RequestSummary:
    """`scope` begins the request's internal id, and is not shown."""
    outcome, first_token_s = timeline.outcome, timeline.first_token_s
    last = timeline.dispatches[-1] if timeline.dispatches else None
    return pb.RequestSummary(
        request_id=timeline.request_id.removeprefix(scope),
        outcome="running" if outcome is None else outcome.value,
        client=timeline.client,
        prompt_tokens=timeline.num_prompt_tokens,
        completion_tokens=sum(timeline.num_output_tokens),
        first_token_s=None if first_token_s is None else first_token_s - timeline.submitted_s,
        duration_s=timeline.ended_s - timeline.submitted_s,
        age_s=now_s - timeline.submitted_s,
        prefill_worker="" if last is None else last.prefill_worker,
        decode_worker="" if last is None else last.decode_worker or "",
    )


def explanation(timeline: Timeline) -> pb.Explanation:
    outcome = timeline.outcome
    first_token_s = timeline.first_token_s
    return pb.Explanation(
        request_id=timeline.request_id,
        outcome="running" if outcome is None else outcome.value,
        error=timeline.error or "",
        prompt_tokens=timeline.num_prompt_tokens,
        completion_tokens=sum(timeline.num_output_tokens),
        first_token_s=None if first_token_s is None else first_token_s - timeline.submitted_s,
        duration_s=timeline.ended_s - timeline.submitted_s,
        num_pauses=timeline.num_times_unread,
        adopted=timeline.is_adopted,
        user=timeline.user,
        trace_id=timeline.traceparent.split("-")[1] if timeline.traceparent else "",
        attempts=[_attempt(dispatch) for dispatch in timeline.dispatches],
    )


def _attempt(dispatch: DispatchTimes) -> pb.ExplainedAttempt:
    measured = legs.account(dispatch)
    return pb.ExplainedAttempt(
        attempt=dispatch.attempt,
        dispatch=dispatch.number,
        prefill_worker=dispatch.prefill_worker,
        decode_worker=dispatch.decode_worker or "",
        num_tokens=dispatch.num_tokens,
        expected_cached_tokens=dispatch.expected_cached_tokens,
        cached_tokens=None if measured is None else measured.num_cached_tokens,
        legs=_legs(dispatch),
        failure=dispatch.failure or "",
        considered=[_place(place) for place in dispatch.considered],
    )


def _legs(dispatch: DispatchTimes) -> Iterator[pb.ExplainedLeg]:
    """The predictions of an adopted dispatch were made by its first router."""
    is_predicted = dispatch.expected_ttft_s > 0
    measured = legs.account(dispatch)
    stats = None if dispatch.prefill is None else dispatch.prefill.stats
    first_token_s = None if dispatch.first_token_s is None else dispatch.first_token_s - dispatch.dispatched_s

    def leg(name: str, predicted_s: float | None, actual_s: float | None) -> pb.ExplainedLeg:
        return pb.ExplainedLeg(leg=name, predicted_s=predicted_s if is_predicted else None, actual_s=actual_s)

    yield leg("queue", None, dispatch.dispatched_s - dispatch.queued_s)
    yield leg("worker queue", dispatch.expected_queue_s, None if measured is None else measured.queue_s)
    yield leg("prefill", dispatch.expected_ttft_s - dispatch.expected_queue_s, legs.prefill_s(dispatch))
    yield leg("first token", dispatch.expected_ttft_s, first_token_s)
    if dispatch.decode_worker not in (None, dispatch.prefill_worker):
        yield leg("transfer", dispatch.expected_transfer_s, None if stats is None else stats.exposed_s)
    if dispatch.decode_worker is not None:
        yield leg("token gap", dispatch.expected_itl_s, legs.gap_s(dispatch))


def _place(place: ConsideredPlace) -> pb.ConsideredPlace:
    return pb.ConsideredPlace(
        prefill_worker=place.prefill_worker,
        decode_worker=place.decode_worker or "",
        has_failed=place.has_failed,
        itl_excess_s=place.itl_excess_s,
        cost_s=place.cost_s,
        load=place.load,
        ttft_s=place.ttft_s,
    )
