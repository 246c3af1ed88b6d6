"""The load that came, as the head's summaries report it, and what may follow: the requests that are being
served, and the latest arrivals once more.

Outputs that have not ended are drawn, given how long they are already: from the product-limit estimate of the
lengths of the latest arrivals (Kaplan and Meier, JASA 53, 1958), as those that have ended so far are the
short ones."""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from random import Random

from ..core.request import FinishReason
from ..router.events import Timeline
from ..router.planning import MAX_CLIENT_CHARS, OpenRequest, SeenRequest, Summary, Terms, Window
from ..telemetry import legs
from ..telemetry.tally import ANSWERS, CLIENTS_DOING
from .forecast import BINS_PER_HORIZON, MAX_BINS

RECENT_S = 10.0  # the latest arrivals: those of so many seconds,
MIN_RECENT = 60  # and at least so many,
MIN_BEGUN = 20  # outputs, to know any
NUM_BEGUN = 100  # outputs: older ones count where fewer of the latest arrivals have begun
MAX_RECENT = 1000  # and at most so many
MAX_REMEMBERED = 4000


def seen_request(timeline: Timeline, terms: Terms) -> SeenRequest | None:
    """Returns a request that is over as the planner sees it; None where its client ended it, or did not
    read: such a one counts as an arrival only."""
    outcome: FinishReason | None = timeline.outcome
    if outcome in CLIENTS_DOING or timeline.is_adopted or timeline.num_times_unread:
        return None
    first_s, gap_s = timeline.first_token_s, legs.request_gap_s(timeline)
    account = legs.account(timeline.dispatches[0]) if timeline.dispatches else None
    is_soon = first_s is not None and first_s - timeline.submitted_s <= terms.ttft_slo_s
    return SeenRequest(
        at_s=timeline.submitted_s,
        num_prompt_tokens=timeline.num_prompt_tokens,
        num_cached_tokens=0 if account is None else account.num_cached_tokens,
        num_output_tokens=sum(timeline.num_output_tokens),
        client=timeline.client[:MAX_CLIENT_CHARS],
        is_good=outcome in ANSWERS and is_soon and (gap_s is None or gap_s <= terms.itl_slo_s),
    )


@dataclass(frozen=True, kw_only=True)
class Recent:
    """The latest arrivals, over `span_s` seconds."""

    requests: Sequence[SeenRequest]
    span_s: float
    num_begun: int  # outputs, by which the others are drawn
    share_good: float  # of the latest arrivals that have ended
    foreseen: Sequence[tuple[OpenRequest, SeenRequest]]  # those that are open, with outputs that are drawn

    @property
    def waiting(self) -> list[SeenRequest]:
        """Returns those without a token."""
        return [known for one, known in self.foreseen if one.first_token_s is None]

    @property
    def rate(self) -> float:
        return len(self.requests) / self.span_s


class OutputLengths:
    """The distribution of outputs, of which some have not ended."""

    def __init__(self, ended: Sequence[int], running: Sequence[int]) -> None:
        """`running` outputs have so many tokens already."""
        self._lengths: list[int] = []  # at which outputs end, ascending
        self._survival: list[float] = []  # share of outputs that are longer
        ended, running = sorted(ended), sorted(running)
        survival = 1.0
        for index, length in enumerate(ended):
            at_risk = len(ended) - index + len(running) - bisect_right(running, length - 1)
            survival *= 1 - 1 / at_risk
            self._lengths.append(length)
            self._survival.append(survival)
        # outputs longer than all that ended: those that run, which go on for as long again in the mean
        longest = self._lengths[-1] if self._lengths else 0
        self._beyond = [length for length in running if length >= longest] or [longest]

    def draw(self, rng: Random, num_tokens: int) -> int:
        """Returns the length of an output that has more than `num_tokens` tokens."""
        index = bisect_right(self._lengths, num_tokens)
        survival = self._survival[index - 1] if index else 1.0
        level = rng.random() * survival
        while index < len(self._lengths) and self._survival[index] > level:
            index += 1
        if index < len(self._lengths):
            return self._lengths[index]
        length = max(num_tokens, rng.choice(self._beyond))
        return length + 1 + int(-log(1.0 - rng.random()) * max(1, self._beyond[-1]))


class SeenLoad:
    """The load that has come. Arrivals older than some horizons are forgotten."""

    def __init__(self) -> None:
        self._summaries: deque[Summary] = deque()
        self._requests: deque[SeenRequest] = deque(maxlen=MAX_REMEMBERED)  # in the order of their ends

    def add(self, summary: Summary) -> None:
        """Summaries are in order of time."""
        self._summaries.append(summary)
        self._requests += summary.seen
        oldest_s = summary.at_s - summary.terms.horizon_s * MAX_BINS / BINS_PER_HORIZON
        while self._summaries[0].at_s <= oldest_s:
            self._summaries.popleft()
        while self._requests and self._requests[0].at_s <= oldest_s:
            self._requests.popleft()

    def recent(self, rng: Random) -> Recent:
        """Returns the latest arrivals, in order; there must be a summary."""
        latest = self._summaries[-1]
        found: list[SeenRequest | OpenRequest] = sorted(
            (*self._requests, *latest.open), key=lambda one: -one.at_s
        )
        num_kept = num_sampled = num_begun = 0
        for one in found:
            is_recent = num_kept < MIN_RECENT or one.at_s > latest.at_s - RECENT_S
            is_recent &= num_kept < MAX_RECENT
            if not is_recent and num_begun >= NUM_BEGUN:
                break
            num_kept += is_recent
            num_sampled += 1
            num_begun += one.num_output_tokens > 0
        kept = found[:num_kept][::-1]
        ended = [one for one in found[:num_sampled] if isinstance(one, SeenRequest)]
        running = [one for one in found[:num_sampled] if isinstance(one, OpenRequest)]
        lengths = OutputLengths(
            [one.num_output_tokens for one in ended], [one.num_output_tokens for one in running]
        )
        num_tokens = max(1, sum(one.num_prompt_tokens for one in ended))
        cached = sum(one.num_cached_tokens for one in ended) / num_tokens
        good = [one.is_good for one in kept if isinstance(one, SeenRequest)]
        foreseen = [(one, _foreseen(one, lengths, cached, rng)) for one in latest.open]
        known = {id(one): seen for one, seen in foreseen}
        return Recent(
            requests=[one if isinstance(one, SeenRequest) else known[id(one)] for one in kept],
            span_s=max(RECENT_S, latest.at_s - kept[0].at_s) if kept else RECENT_S,
            num_begun=num_begun,
            share_good=sum(good) / len(good) if good else 1.0,
            foreseen=sorted(foreseen, key=lambda pair: pair[0].at_s),
        )

    @property
    def seen_s(self) -> float:
        """Returns for how long arrivals have been counted."""
        return sum(summary.duration_s for summary in self._summaries)

    def rates(self) -> list[float]:
        """Returns the arrivals per second of each bin that was seen as a whole, oldest first. A summary's
        arrivals count as evenly spread."""
        if not self._summaries:
            return []
        now_s = self._summaries[-1].at_s
        bin_s = self._summaries[-1].terms.horizon_s / BINS_PER_HORIZON
        counts = [0.0] * min(MAX_BINS, int(self.seen_s / bin_s + 1e-9))
        for summary in self._summaries:
            if summary.duration_s <= 0:
                continue
            rate = summary.num_arrived / summary.duration_s
            ages_s = now_s - summary.at_s, now_s - summary.at_s + summary.duration_s
            for age in range(int(ages_s[0] / bin_s), min(len(counts), int(ages_s[1] / bin_s) + 1)):
                overlap_s = min(ages_s[1], (age + 1) * bin_s) - max(ages_s[0], age * bin_s)
                counts[age] += rate * max(0.0, overlap_s)
        return [count / bin_s for count in reversed(counts)]


def _foreseen(one: OpenRequest, lengths: OutputLengths, cached: float, rng: Random) -> SeenRequest:
    """`cached`: the share of prompts that is cached, for a request without a place."""
    num_cached = one.num_cached_tokens or int(cached * one.num_prompt_tokens)
    num_output = lengths.draw(rng, one.num_output_tokens)
    return SeenRequest(one.at_s, one.num_prompt_tokens, num_cached, num_output, one.client, False)


def window_of(recent: Recent, summary: Summary, forecast_rate: float) -> Window:
    requests, count = recent.requests, max(1, len(recent.requests))
    num_decoding = sum(one.first_token_s is not None for one in summary.open)
    return Window(
        num_requests=len(requests),
        rate=recent.rate,
        forecast_rate=forecast_rate,
        num_waiting=len(summary.open) - num_decoding,
        num_decoding=num_decoding,
        mean_prompt_tokens=sum(request.num_prompt_tokens for request in requests) / count,
        mean_cached_tokens=sum(request.num_cached_tokens for request in requests) / count,
        mean_output_tokens=sum(request.num_output_tokens for request in requests) / count,
        num_clients=len({request.client for request in requests}),
    )
