"""Policies that choose a ratio: pdserve's planner, and published rules.

The devices are given, so that every policy decides only how to divide them; a rule that asks for more or for
fewer gets the same proportions."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from statistics import fmean

from pdserve.planner.durations import Durations
from pdserve.planner.live import LivePlanner
from pdserve.planner.pace import Pace
from pdserve.router.planner_desk import Mode, PlannerDesk
from pdserve.router.planning import Advice, Ratio, SeenRequest, Summary

from .changing_cluster import Gauges
from .profiles import Service

REPLAY_TOKEN_S = 12e-6  # of processor time: measured, on an AMD EPYC


@dataclass
class Fixed:
    """Never changes the ratio."""

    def decide(self, summary: Summary, gauges: Gauges) -> Ratio | None:
        return None


@dataclass
class Scripted:
    """Changes the ratio at given instants."""

    changes: Sequence[tuple[float, Ratio]]
    _num_done: int = 0

    def decide(self, summary: Summary, gauges: Gauges) -> Ratio | None:
        if self._num_done == len(self.changes) or self.changes[self._num_done][0] > summary.at_s:
            return None
        self._num_done += 1
        return self.changes[self._num_done - 1][1]


@dataclass
class Auto:
    """Production's planner, the head's desk, and the pace of the planner's process. Decisions cost what their
    replays take on an idle machine, so that the outcome does not depend on who else uses this one."""

    planner: LivePlanner = field(default_factory=LivePlanner)
    desk: PlannerDesk = field(default_factory=PlannerDesk)
    pace: Pace = field(default_factory=Pace)
    advice: list[Advice] = field(default_factory=list)
    _ratio: Ratio | None = None

    def decide(self, summary: Summary, gauges: Gauges) -> Ratio | None:
        if summary.ratio != self._ratio:
            self._ratio = summary.ratio
            self.desk.configure(Mode.AUTO, summary.terms.bounds, summary.ratio)
        self.desk.number_summary()
        self.planner.observe(summary)
        if not self.pace.allows(summary.at_s) or not self.planner.is_due:
            return None
        num_replayed = self.planner.num_replayed_tokens
        advice = self.planner.decide()
        self.pace.spend(REPLAY_TOKEN_S * (self.planner.num_replayed_tokens - num_replayed))
        self.advice.append(advice)
        return self.desk.receive(advice, summary.at_s, is_settled=summary.is_settled)


@dataclass
class Reactive:
    """Thresholds on the prefill queue and on KV usage, one instance a minute: Dynamo's load-based planner
    (its documentation, "Load-based Planner", with its defaults of 5 waiting prompts an instance and 0.9 of
    the blocks)."""

    every_s: float = 60.0
    _queued: list[float] = field(default_factory=list)
    _kv: list[float] = field(default_factory=list)
    _since_s: float = 0.0

    def decide(self, summary: Summary, gauges: Gauges) -> Ratio | None:
        self._queued.append(gauges.queued_per_prefill)
        self._kv.append(gauges.kv_usage)
        if summary.at_s - self._since_s < self.every_s:
            return None
        queued, kv = fmean(self._queued), fmean(self._kv)
        self._since_s, self._queued, self._kv = summary.at_s, [], []
        step = (queued > 5.0 and kv < 0.9) - (kv > 0.9 and queued < 5.0)
        if step == 0:
            step = (queued > 5.0 and kv < 0.5) - (kv > 0.5 and queued < 0.2)
        to = Ratio(summary.ratio.num_prefill + step, summary.ratio.num_decode - step)
        return to if step and summary.terms.bounds.allow(to) else None


@dataclass
class _Interval:
    """The means of what came in the last interval, of which Dynamo and TokenScale decide."""

    length_s: float
    _summaries: deque[Summary] = field(default_factory=deque)

    def add(self, summary: Summary) -> bool:
        """Returns whether an interval is full, which begins another."""
        if self._summaries and sum(one.duration_s for one in self._summaries) >= self.length_s:
            self._summaries.clear()
        self._summaries.append(summary)
        return sum(one.duration_s for one in self._summaries) >= self.length_s

    @property
    def rate(self) -> float:
        return sum(one.num_arrived for one in self._summaries) / sum(
            one.duration_s for one in self._summaries
        )

    @property
    def requests(self) -> list[SeenRequest]:
        return [request for one in self._summaries for request in one.seen]


@dataclass
class Dynamo:
    """The throughput-based rule of Dynamo's SLA planner ("Planner Design" in its documentation): from the
    mean lengths of an interval, instances = rate / the rate that a profile says one sustains, rounded up. A
    prefill instance computes one prompt after the other; a decode instance has the largest batch within the
    ITL objective, with contexts of the prompt and half of the output."""

    service: Service
    interval_s: float = 180.0

    def __post_init__(self) -> None:
        self._interval = _Interval(self.interval_s)

    def decide(self, summary: Summary, gauges: Gauges) -> Ratio | None:
        if not self._interval.add(summary) or not (requests := self._interval.requests):
            return None
        new = fmean(one.num_prompt_tokens - one.num_cached_tokens for one in requests)
        prompt = fmean(one.num_prompt_tokens for one in requests)
        output = fmean(one.num_output_tokens for one in requests)
        durations = self.service.profile.durations
        prefill_rate = 1 / _prompt_s(durations, new)
        itl_s = summary.terms.itl_slo_s
        batch = largest_batch(self.service, prompt + output / 2, itl_s)
        decode_rate = batch / (output * _itl_s(durations, batch, prompt + output / 2))
        return _divided(
            ceil(self._interval.rate / prefill_rate), ceil(self._interval.rate / decode_rate), summary
        )


@dataclass
class TokenScale:
    """Token velocities (Lai et al., arXiv 2512.03416): prefill instances = prompt tokens that come per second
    / min(prefill's, network's velocity); decode instances = for each class of requests by length, the tokens
    that come per second / the tokens that an instance releases per second of such requests. Bursts go to
    decode instances, as `prefill_on_decode` has it."""

    service: Service
    interval_s: float = 10.0
    bucket_tokens: int = 1024

    def __post_init__(self) -> None:
        self._interval = _Interval(self.interval_s)

    def decide(self, summary: Summary, gauges: Gauges) -> Ratio | None:
        if not self._interval.add(summary) or not (requests := self._interval.requests):
            return None
        profile = self.service.profile
        rate = self._interval.rate / len(requests)  # of each
        prompt = fmean(one.num_prompt_tokens for one in requests)
        prefill_velocity = prompt / _prompt_s(profile.durations, prompt)
        network_velocity = profile.durations.link_bytes_per_s / profile.layout.bytes_per_token
        num_prefill = rate * sum(one.num_prompt_tokens for one in requests)
        num_prefill /= min(prefill_velocity, network_velocity)
        num_decode = sum(
            rate * len(alike) / self._released(alike, summary) for alike in self._classes(requests)
        )
        return _divided(ceil(num_prefill), ceil(num_decode), summary)

    def _classes(self, requests: Sequence[SeenRequest]) -> Iterator[list[SeenRequest]]:
        found: dict[tuple[int, int], list[SeenRequest]] = {}
        for one in requests:
            key = one.num_prompt_tokens // self.bucket_tokens, one.num_output_tokens // self.bucket_tokens
            found.setdefault(key, []).append(one)
        yield from found.values()

    def _released(self, alike: Sequence[SeenRequest], summary: Summary) -> float:
        """Returns how many such requests an instance ends per second."""
        output = fmean(one.num_output_tokens for one in alike)
        context = fmean(one.num_prompt_tokens for one in alike) + output / 2
        batch = largest_batch(self.service, context, summary.terms.itl_slo_s)
        return batch / (output * _itl_s(self.service.profile.durations, batch, context))


def _prompt_s(durations: Durations, num_tokens: float) -> float:
    return (
        durations.prefill_step_s
        + durations.prefill_token_s * num_tokens
        + durations.prefill_square_s * num_tokens**2
    )


def _itl_s(durations: Durations, batch: int, context: float) -> float:
    decode = durations.decode if batch < durations.large_batch else durations.decode_large
    return decode.step_s + batch * (decode.context_token_s * context + decode.sequence_s)


def largest_batch(service: Service, context: float, itl_s: float) -> int:
    """Returns how many sequences an instance decodes within the objective and its KV; at least one."""
    profile = service.profile
    fit = int(profile.kv_bytes / (profile.layout.bytes_per_token * context))
    batch = max(1, min(profile.max_batch_size, fit))
    while batch > 1 and _itl_s(profile.durations, batch, context) > itl_s:
        batch -= 1
    return batch


def _divided(num_prefill: int, num_decode: int, summary: Summary) -> Ratio | None:
    """Returns all devices in the proportion that is asked for; None where nothing is."""
    total = summary.terms.bounds.max_instances
    if num_prefill + num_decode == 0:
        return None
    prefill = round(total * num_prefill / (num_prefill + num_decode))
    prefill = min(max(1, prefill), total - 1)
    return Ratio(prefill, total - prefill)
