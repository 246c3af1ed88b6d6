"""Replays what may follow on a ratio: the cluster begins with the present ratio and the requests that it
serves, takes the steps to the other ratio, and gets the latest arrivals once more.

A step of the schedulers costs the same here as there, so that replays are what the planner's process spends
its time on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import fmean

from msgspec import structs

from ..core.messages import Role
from ..loadgen.slo import Slo
from ..router.planning import InstanceFacts, Ratio, Summary, Terms
from .changes import FLIP_S, Change
from .durations import Durations
from .seen_load import Recent
from .virtual_cluster import Arrival, Decoding, ServedRequest, VirtualCluster
from .virtual_instance import InstanceShape

BLOCK_TOKENS = 64  # replays hash prompts in blocks of at least this size
# a replay takes some 12 us a token of output, a tenth of that a token of a prompt, and as long as
# REQUEST_TOKENS of output for each request: about 1 s
MAX_REPLAYED = 90_000  # in tokens of output
REQUEST_TOKENS = 40
MIN_SPAN_S = 10.0  # of arrivals
SOON_S = 1e-6


@dataclass(frozen=True)
class Outlook:
    """The requests of a replay. Instant 0 is now."""

    decoding: Sequence[Decoding]
    arrivals: Sequence[Arrival]  # those that wait now are the first ones, before instant 0
    drain_s: float  # how long the streams of an instance take to end
    num_tokens: int  # of output: a replay takes as long as so many do

    @property
    def num_requests(self) -> int:
        return len(self.decoding) + len(self.arrivals)


def outlook(summary: Summary, recent: Recent, rate: float, rng: Random) -> Outlook:
    """Returns what may follow, with new requests at `rate`."""
    now_s, max_len = summary.at_s, summary.terms.max_model_len
    prompts = _Prompts()
    decoding, waiting = [], []
    num_tokens = 0
    for one, known in recent.foreseen:
        num_output, num_so_far = known.num_output_tokens, one.num_prompt_tokens + one.num_output_tokens
        num_left = max(1, min(num_output - one.num_output_tokens, max_len - num_so_far))
        prompt = prompts.of(one.client, min(num_so_far, max_len - 1), known.num_cached_tokens)
        num_tokens += num_left + num_so_far // 10 + REQUEST_TOKENS
        if one.first_token_s is None:
            waiting.append(Arrival(one.at_s - now_s, prompt, num_left))
        else:
            first_s = one.first_token_s - now_s
            decoding.append(Decoding(one.at_s - now_s, prompt, first_s, one.num_output_tokens, num_left))
    per_request = fmean(one.num_output_tokens + one.num_prompt_tokens / 10 for one in recent.requests)
    per_s = rate * (per_request + REQUEST_TOKENS)
    span_s = min(summary.terms.horizon_s, max(MIN_SPAN_S, (MAX_REPLAYED - num_tokens) / per_s))
    num_tokens += round(per_s * span_s)
    arrivals = waiting + list(_repeated(recent, rate, span_s, max_len, prompts))
    gap_s = fmean(one.decode_factor for one in summary.instances) * summary.latency.small.decode_step_s
    drain_s = 2 * gap_s * fmean(one.num_output_tokens for one in recent.requests)
    return Outlook(decoding, arrivals, drain_s, num_tokens)


def _repeated(recent: Recent, rate: float, span_s: float, max_len: int, prompts: "_Prompts") -> list[Arrival]:
    """Returns the latest arrivals, again and again, with their gaps stretched to the rate."""
    requests = recent.requests
    end_s = requests[-1].at_s
    stretch, period_s = recent.rate / rate, recent.span_s
    found = []
    for number in range(round(rate * span_s)):
        turn, index = divmod(number, len(requests))
        one = requests[index]
        prompt = prompts.of(one.client, min(one.num_prompt_tokens, max_len - 1), one.num_cached_tokens)
        at_s = (one.at_s - end_s + period_s * (turn + 1)) * stretch
        found.append(Arrival(max(0.0, at_s), prompt, min(one.num_output_tokens, max_len - len(prompt))))
    return found


class _Prompts:
    """Token ids: the cached prefixes of one client begin alike, and share nothing with those of another."""

    def __init__(self) -> None:
        self._clients: dict[str, int] = {}
        self._num = 0

    def of(self, client: str, num_tokens: int, num_cached: int) -> tuple[int, ...]:
        num_tokens = max(1, num_tokens)
        num_shared = min(num_cached, num_tokens)
        number = self._clients.setdefault(client, len(self._clients))
        self._num += 1
        return (2 * number,) * num_shared + (2 * self._num + 1,) * (num_tokens - num_shared)


@dataclass(frozen=True)
class Replay:
    """How one ratio served."""

    are_good: tuple[bool, ...]  # by request
    late_s: float = 0.0  # for how long it would be too late for those that come afterwards
    is_whole: bool = True  # not given up

    @property
    def attainment(self) -> float:
        return fmean(self.are_good)

    @property
    def num_bad(self) -> int:
        return self.are_good.count(False)


def replay(summary: Summary, ratio: Ratio, what: Outlook, max_bad: int | None = None) -> Replay:
    """Replays the change to a ratio, and what follows; given up once more than `max_bad` requests are bad, as
    all that are left count then."""
    terms = summary.terms
    coarser = max(1, BLOCK_TOKENS // terms.layout.block_size)
    layout = structs.replace(terms.layout, block_size=coarser * terms.layout.block_size)
    change = Change.between(summary.ratio, ratio, can_flip=terms.can_flip)
    there, new = _shapes(summary, change.starts, coarser)
    cluster = VirtualCluster(there, layout, terms.router)
    jury = _Jury(cluster, what, terms, max_bad)

    def drain() -> None:
        for role, count in change.stops.items():
            for _ in range(count):
                cluster.drain(cluster.least_loaded(role))

    def flip() -> None:
        flipped = (Role.PREFILL, Role.DECODE) if change.num_to_decode > 0 else (Role.DECODE, Role.PREFILL)
        for _ in range(abs(change.num_to_decode)):
            cluster.assign(cluster.least_loaded(flipped[0]), flipped[1])

    cluster.call_at(0.0, drain)
    cluster.call_at(FLIP_S, flip)
    for shape in new:
        cluster.call_at(change.delay_s(summary, what.drain_s), partial(cluster.join, shape))
    cluster.serve(what.arrivals, jury.ended, what.decoding)
    return jury.verdict()


class _Jury:
    """Finds out which requests are good, and ends a replay once all are known to be or not: one without a
    token after the TTFT objective is bad, however long it still waits."""

    def __init__(self, cluster: VirtualCluster, what: Outlook, terms: Terms, max_bad: int | None) -> None:
        self._cluster = cluster
        self._slo = Slo(ttft=terms.ttft_slo_s * 1e3, tpot=terms.itl_slo_s * 1e3)
        self._num_requests, self._num_decoding = what.num_requests, len(what.decoding)
        self._max_bad = max_bad
        self._num_open = what.num_requests
        self._bad: set[int] = set()  # by number of the request
        self._late_s = 0.0
        for number, one in enumerate(what.decoding):
            if one.first_token_s - one.at_s > terms.ttft_slo_s:
                self._note(number, is_bad=True)
        for number, arrival in enumerate(what.arrivals, len(what.decoding)):
            # behind what comes at instant 0
            due_s = max(SOON_S, arrival.at_s + terms.ttft_slo_s + SOON_S)
            cluster.call_at(due_s, partial(self._due, number))
        cluster.call_at(max(0.0, what.arrivals[-1].at_s) + terms.ttft_slo_s, self._measure_queue)

    def ended(self, served: ServedRequest) -> bool:
        """Returns whether all is known."""
        if served.number not in self._bad:
            self._note(served.number, bool(served.misses(self._slo)))
        return self._is_over

    @property
    def _is_over(self) -> bool:
        return self._num_open == 0 or not self._is_whole

    @property
    def _is_whole(self) -> bool:
        return self._max_bad is None or len(self._bad) <= self._max_bad

    def _measure_queue(self) -> None:
        """Those that come when the last one is due wait until as many have got their first token."""
        came = self._cluster.served[self._num_decoding :]
        num_waiting = sum(not one.token_s for one in came)
        self._late_s = num_waiting * self._cluster.now_s / max(1, len(came) - num_waiting)

    def _due(self, number: int) -> None:
        if number not in self._bad and not self._cluster.served[number].token_s:
            self._note(number, is_bad=True)
            if self._is_over:
                self._cluster.stop()

    def _note(self, number: int, is_bad: bool) -> None:
        self._num_open -= 1
        if is_bad:
            self._bad.add(number)

    def verdict(self) -> Replay:
        if not self._is_whole:
            return Replay((False,) * self._num_requests, is_whole=False)
        return Replay(tuple(number not in self._bad for number in range(self._num_requests)), self._late_s)


def _shapes(
    summary: Summary, starts: Mapping[Role, int], coarser: int
) -> tuple[list[InstanceShape], list[InstanceShape]]:
    """Returns the instances that are there, and those that start, which are like them. Blocks are so many
    times as large."""
    terms, durations = summary.terms, Durations.learnt(summary.latency)
    num_blocks = round(fmean(one.num_blocks for one in summary.instances))

    def shape(facts: InstanceFacts) -> InstanceShape:
        limits = terms.prefill if facts.role is Role.PREFILL else terms.decode
        return InstanceShape(
            role=facts.role,
            durations=durations.slowed(facts.prefill_factor, facts.decode_factor),
            num_blocks=facts.num_blocks // coarser,
            max_model_len=terms.max_model_len,
            max_batch_tokens=limits.max_batch_tokens,
            max_batch_size=limits.max_batch_size,
        )

    new = [InstanceFacts(role, num_blocks, 1.0, 1.0) for role, count in starts.items() for _ in range(count)]
    return [shape(facts) for facts in summary.instances], [shape(facts) for facts in new]
