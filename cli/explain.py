"""`pdserve explain`: one request's actual and predicted times, and the reasons for its placement."""

from collections.abc import Iterator

from ..proto import pdserve_pb2 as pb
from .client import Client
from .terminal import show


def explain(client: Client, request_id: str) -> None:
    """Print it."""
    for line in explanation_lines(client.cluster.Explain(pb.ExplainRequest(request_id=request_id))):
        show(line)


def explanation_lines(explanation: pb.Explanation) -> Iterator[str]:
    first = (
        f", first token after {milliseconds(explanation.first_token_s)}"
        if explanation.HasField("first_token_s")
        else ""
    )
    tokens = f"{explanation.prompt_tokens} + {explanation.completion_tokens} tokens"
    duration = milliseconds(explanation.duration_s)
    yield f"{explanation.request_id!r}: {explanation.outcome} after {duration}, {tokens}{first}"
    if explanation.error:
        yield explanation.error
    if explanation.user:
        yield f"user {explanation.user!r}"
    if explanation.trace_id:
        yield f"trace {explanation.trace_id}"
    if explanation.adopted:
        yield "taken over from a router that died: times count from then"
    if explanation.num_pauses:
        yield f"paused {explanation.num_pauses} times because its client did not read"
    for attempt in explanation.attempts:
        yield ""
        yield from _attempt_lines(attempt)


def _attempt_lines(attempt: pb.ExplainedAttempt) -> Iterator[str]:
    cached = f", {attempt.cached_tokens} cached ({attempt.expected_cached_tokens} expected)"
    known = cached if attempt.HasField("cached_tokens") else ""
    place = _place(attempt.prefill_worker, attempt.decode_worker)
    yield (
        f"attempt {attempt.attempt} (dispatch {attempt.dispatch}): {place}, {attempt.num_tokens}"
        f" tokens{known}"
    )
    yield f"  {'LEG':<13} {'PREDICTED':>10} {'ACTUAL':>10}"
    for leg in attempt.legs:
        predicted = milliseconds(leg.predicted_s) if leg.HasField("predicted_s") else "-"
        actual = milliseconds(leg.actual_s) if leg.HasField("actual_s") else "-"
        yield f"  {leg.leg:<13} {predicted:>10} {actual:>10}"
    if attempt.failure:
        yield f"  failed: {attempt.failure}"
    if attempt.considered:
        yield f"  {_why(list(attempt.considered))}"
        yield from _others(list(attempt.considered))


def _why(places: list[pb.ConsideredPlace]) -> str:
    """The first in which the chosen place was better than the next."""
    if len(places) == 1:
        return "placed there because no other place had room"
    chosen, following = places[:2]
    there = _place(following.prefill_worker, following.decode_worker)
    if chosen.has_failed != following.has_failed:
        return f"placed there because this request had failed at {there} before"
    if chosen.itl_excess_s != following.itl_excess_s:
        return (
            f"placed there because gaps between tokens at {there} would exceed the SLO by"
            f" {milliseconds(following.itl_excess_s)}"
        )
    if chosen.cost_s != following.cost_s:
        return (
            f"placed there for the least predicted cost: {milliseconds(chosen.cost_s)}, against"
            f" {milliseconds(following.cost_s)} at {there}"
        )
    if chosen.load != following.load:
        return f"placed there for the lower load: {chosen.load:.0%}, against {following.load:.0%} at {there}"
    return f"placed there by name: {there} was as good"


def _others(places: list[pb.ConsideredPlace]) -> Iterator[str]:
    yield f"  {'CONSIDERED':<26} {'TTFT':>10} {'COST':>10} {'OVER SLO':>10} {'LOAD':>6}"
    for place in places:
        name = _place(place.prefill_worker, place.decode_worker) + (" (failed)" if place.has_failed else "")
        excess = milliseconds(place.itl_excess_s) if place.itl_excess_s else "-"
        ttft, cost = milliseconds(place.ttft_s), milliseconds(place.cost_s)
        yield f"  {name:<26} {ttft:>10} {cost:>10} {excess:>10} {place.load:>6.0%}"


def _place(prefill_worker: str, decode_worker: str) -> str:
    if not decode_worker:
        return f"{prefill_worker} alone"
    return (
        f"{prefill_worker} for both phases"
        if prefill_worker == decode_worker
        else f"{prefill_worker} -> {decode_worker}"
    )


def milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
