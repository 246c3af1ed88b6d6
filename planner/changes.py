"""The price of a change of ratio: how long until it serves, and the good requests that it costs meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..router.planning import Ratio, SeenRequest, Summary

FLIP_S = 1.0  # an upper bound: a flip takes less


@dataclass(frozen=True)
class Change:
    """The steps from one ratio to another: flips first, which keep caches and load nothing."""

    num_flips: int
    num_starts: int
    num_stops: int
    num_leaving_prefill: int

    @classmethod
    def between(cls, present: Ratio, wanted: Ratio, *, can_flip: bool) -> "Change":
        more = [
            wanted.num_prefill - present.num_prefill,
            wanted.num_decode - present.num_decode,
        ]
        num_starts = sum(max(0, count) for count in more)
        num_stops = sum(max(0, -count) for count in more)
        num_flips = min(num_starts, num_stops) if can_flip else 0
        return cls(num_flips, num_starts - num_flips, num_stops - num_flips, max(0, -more[0]))


@dataclass(frozen=True)
class Price:
    """`num_requests`: good ones that are lost. `delay_s`: until the new ratio serves."""

    num_requests: float
    delay_s: float


def price(
    summary: Summary, wanted: Ratio, requests: Sequence[SeenRequest], goodput: float, drain_s: float
) -> Price:
    """`requests` are those of the window, `goodput` that of the present ratio; `drain_s` is how long the
    streams of an instance take to end."""
    present, terms = summary.ratio, summary.terms
    change = Change.between(present, wanted, can_flip=terms.can_flip)
    each = goodput / max(1, present.num_instances)
    # a place is free only once an instance that gives it up has drained
    is_full = change.num_starts > 0 and (
        present.num_instances + change.num_starts > terms.bounds.max_instances
    )
    delay_s = FLIP_S if change.num_flips else 0.0
    num_lost = FLIP_S * change.num_flips * each
    if change.num_starts:
        delay_s = max(delay_s, summary.start_s + (drain_s if is_full else 0.0))
    if change.num_stops and change.num_starts:
        num_lost += delay_s * change.num_stops * each
    return Price(num_lost + _lost_prefixes(summary, change, requests), delay_s)


def _lost_prefixes(summary: Summary, change: Change, requests: Sequence[SeenRequest]) -> float:
    """Returns how many requests could be prefilled in the time that it takes to compute again what the
    leaving prefill instances cache."""
    if not change.num_leaving_prefill or not requests:
        return 0.0
    cached: dict[str, int] = {}
    num_new_tokens = 0
    for request in requests:
        cached[request.client] = max(cached.get(request.client, 0), request.num_cached_tokens)
        num_new_tokens += max(1, request.num_prompt_tokens - request.num_cached_tokens)
    share = change.num_leaving_prefill / summary.ratio.num_prefill
    return share * sum(cached.values()) / (num_new_tokens / len(requests))
