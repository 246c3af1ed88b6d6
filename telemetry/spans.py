"""A request's timeline as the spans of its trace: one for the request, one below it for each leg of each
attempt."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..core.request import FinishReason
from ..router.events import DispatchTimes, Timeline
from . import legs

Attribute = str | int | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SpanTimes:
    """One span; instants are on the router's clock. `error`: its failure."""

    name: str
    start_s: float
    end_s: float
    attributes: dict[str, Attribute] = field(default_factory=dict)
    error: str | None = None


FAILURES = (FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.INVALID, FinishReason.FATAL)


def request_span(timeline: Timeline) -> SpanTimes:
    """The request as a whole; names as in OpenTelemetry's conventions for generative AI where there are
    some."""
    outcome = timeline.outcome
    has_failed = outcome in FAILURES
    attributes: dict[str, Attribute] = {
        "pdserve.request_id": timeline.request_id,
        "pdserve.num_attempts": len(timeline.dispatches),
        "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.output_tokens": sum(timeline.num_output_tokens),
        "gen_ai.response.finish_reasons": tuple(
            reason.value for reason in timeline.finish_reasons if reason is not None
        ),
    }
    if timeline.first_token_s is not None:
        attributes["gen_ai.server.time_to_first_token"] = timeline.first_token_s - timeline.submitted_s
    error = (
        (timeline.error or f"the request ended with {outcome.value}")
        if outcome is not None and has_failed
        else None
    )
    return SpanTimes("request", timeline.submitted_s, timeline.ended_s, attributes, error)


def leg_spans(timeline: Timeline) -> Iterator[SpanTimes]:
    """The spans of legs in order of attempts. A request that never left the queue has the queue only."""
    for dispatch in timeline.dispatches:
        yield from _legs(dispatch, timeline.ended_s if dispatch.ended_s is None else dispatch.ended_s)
    if not timeline.dispatches:
        yield SpanTimes("queue", timeline.submitted_s, timeline.ended_s)


def _legs(dispatch: DispatchTimes, ended_s: float) -> Iterator[SpanTimes]:
    shared: dict[str, Attribute] = {"pdserve.attempt": dispatch.attempt, "pdserve.dispatch": dispatch.number}
    yield SpanTimes("queue", dispatch.queued_s, dispatch.dispatched_s, shared)
    failure = dispatch.failure
    first_token_s = dispatch.first_token_s
    yield _prefill(dispatch, ended_s if first_token_s is None else first_token_s, shared)
    if first_token_s is None:
        return
    stats = dispatch.prefill.stats if dispatch.prefill is not None else None
    if stats is not None:
        end_s = first_token_s + stats.exposed_s
        route: dict[str, Attribute] = {
            "pdserve.num_bytes": stats.num_bytes,
            "pdserve.hidden_bytes": stats.hidden_bytes,
        }
        route |= {"pdserve.source": dispatch.prefill_worker, "pdserve.target": dispatch.decode_worker or ""}
        yield SpanTimes("transfer", end_s - stats.duration_s, end_s, shared | route)
    if dispatch.decode_worker is not None:
        work: dict[str, Attribute] = {
            "pdserve.worker": dispatch.decode_worker,
            "pdserve.num_tokens": dispatch.num_steps,
        }
        yield SpanTimes("decode", first_token_s, max(ended_s, first_token_s), shared | work, failure)


def _prefill(dispatch: DispatchTimes, end_s: float, shared: dict[str, Attribute]) -> SpanTimes:
    report = legs.account(dispatch)
    work: dict[str, Attribute] = {
        "pdserve.worker": dispatch.prefill_worker,
        "pdserve.num_tokens": dispatch.num_tokens,
        "pdserve.expected_ttft": dispatch.expected_ttft_s,
    }
    start_s = dispatch.dispatched_s
    if report is not None:
        work |= {
            "pdserve.num_cached_tokens": report.num_cached_tokens,
            "pdserve.worker_queue": report.queue_s,
        }
        start_s = min(start_s + report.queue_s, end_s)
    has_failed = dispatch.failure is not None and dispatch.first_token_s is None
    return SpanTimes(
        "prefill", start_s, max(end_s, start_s), shared | work, dispatch.failure if has_failed else None
    )
