"""The live planner's decisions: whether another ratio serves the load of the next horizon better than the
present one, by more than the change costs.

    Summary --observe--> SeenLoad, Calibration
    decide: forecast -> replay of each candidate -> gain, cost -> Advice

Every candidate serves the same requests. The requests are cut into batches, and a gain is the lower end of
the confidence interval of the mean of the batches' differences (batch means; Law, Simulation Modeling and
Analysis, chapter 9). No clock and no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from statistics import fmean, stdev

from msgspec import structs

from ..core.messages import Role
from ..loadgen.slo import Slo
from ..router.planning import Advice, Candidate, InstanceFacts, Objective, Ratio, SeenRequest, Summary, Window
from .calibration import Calibration
from .changes import price
from .durations import Durations
from .forecast import Forecast, last_window, recent_peaks
from .seen_load import SeenLoad, arrivals, window_of
from .virtual_cluster import ServedRequest, VirtualCluster
from .virtual_instance import InstanceShape

NUM_BATCHES = 6  # the first one fills the empty cluster, and is not counted
STUDENT = 2.776  # two-sided 95 % point of Student's t, with 4 degrees of freedom
MIN_REQUESTS = 60
MIN_SHARE_SEEN = 0.5  # of a horizon
# a replay takes some 16 us a token of output, and a tenth of that a token of a prompt: at most 1.6 s
MIN_REPLAYED, MAX_REPLAYED = 40_000, 100_000  # tokens of output, and tenths of those of prompts
NUM_DURATIONS = 3  # of a request: a replay begins with an empty cluster, and should last longer by far
BLOCK_TOKENS = 64  # replays hash prompts in blocks of at least this size
FIRST_LOOK = 2  # a first look at candidates takes one request in so many
NUM_FINALISTS = 2
MAX_CANDIDATES = 9
MARGIN = 0.02  # of the requests of a horizon: what a change has to bring beyond its cost
INSTANCE_SHARE = 0.03  # under the objective "cost", an instance counts as much as this share of the requests
LEAST_TRUST = 0.5
CHANGED = 0.15  # relative: the load is another one
NUM_STEADY_HORIZONS = 2  # between decisions on a load that stays
RETURN_FACTOR = 2.0  # costs and margin of a change that takes back the last one, for two horizons

FORECASTS: dict[Objective, Forecast] = {Objective.GOODPUT: last_window, Objective.COST: recent_peaks}


@dataclass(frozen=True)
class _Replay:
    """How one ratio served."""

    are_good: tuple[bool, ...]
    mean_e2e_s: float
    is_whole: bool = True  # not given up

    @property
    def max_bad(self) -> int:
        """Returns how many bad requests another ratio may have and still be better: those of this one, and
        as many as a batch has, since one is not counted."""
        return self.are_good.count(False) + ceil(len(self.are_good) / NUM_BATCHES)

    def shares(self) -> list[float]:
        """Returns the share of good requests in each batch that counts."""
        size = len(self.are_good) / NUM_BATCHES
        cuts = [round(number * size) for number in range(1, NUM_BATCHES + 1)]
        return [fmean(self.are_good[start:end]) for start, end in pairwise(cuts)]


@dataclass(frozen=True)
class _Decided:
    """A decision for which ratios were replayed."""

    at_s: float
    ratio: Ratio
    window: Window
    mean_e2e_s: float  # of a request

    def is_like(self, window: Window) -> bool:
        """Whether a window has about the same load of prompts, and of outputs."""
        return all(
            abs(new - old) <= CHANGED * old
            for new, old in zip(_loads(window), _loads(self.window), strict=True)
        )


class LivePlanner:
    """Fed with every summary in order; `decide` looks at what is known then."""

    def __init__(self) -> None:
        self._load = SeenLoad()
        self._calibration = Calibration()
        self._latest: Summary | None = None
        self._left: tuple[Ratio, float] | None = None  # the ratio before the last change, and when that was
        self._decided: _Decided | None = None

    def observe(self, summary: Summary) -> None:
        if self._latest is not None and summary.ratio != self._latest.ratio:
            self._left = self._latest.ratio, summary.at_s
        self._latest = summary
        self._load.add(summary)
        self._calibration.observe(summary)

    @property
    def is_due(self) -> bool:
        """Whether another load, or the time since the last decision, gives reason for another one: replays
        are spared for a load that changes."""
        summary, last = self._latest, self._decided
        if summary is None or last is None:
            return True
        num_horizons = NUM_STEADY_HORIZONS if summary.ratio == last.ratio else 1
        is_old = summary.at_s - last.at_s >= num_horizons * summary.terms.horizon_s
        return is_old or not last.is_like(self._window(summary, self._requests))

    @property
    def _requests(self) -> list[SeenRequest]:
        """Returns those to replay: as many as last several times longer than a request."""
        num_tokens = MIN_REPLAYED
        if self._decided is not None:
            window = self._decided.window
            per_request = window.mean_output_tokens + window.mean_prompt_tokens / 10
            num_tokens = round(NUM_DURATIONS * self._decided.mean_e2e_s * window.rate * per_request)
        return self._load.latest(min(max(MIN_REPLAYED, num_tokens), MAX_REPLAYED))

    def _window(self, summary: Summary, requests: Sequence[SeenRequest]) -> Window:
        rates = self._load.rates()
        rate = last_window(rates) if rates else 0.0
        forecast = FORECASTS[summary.terms.objective](rates) if rates else 0.0
        return window_of(requests, rate, forecast)

    def decide(self) -> Advice:
        """Returns the advice that follows from the latest summary; there must be one."""
        summary = self._latest
        assert summary is not None
        terms, requests = summary.terms, self._requests
        window = self._window(summary, requests)
        why_not = self._why_not(summary, window)
        if why_not is not None:
            return self._stay(summary, window, why_not)
        candidates = self._weigh(summary, window, requests)
        predicted = {one.ratio: window.rate * one.attainment for one in candidates if not one.is_screened_out}
        self._calibration.predict(summary.at_s, terms.horizon_s, predicted)
        return self._choose(summary, window, candidates)

    def _why_not(self, summary: Summary, window: Window) -> str | None:
        """Returns why nothing can be said yet."""
        terms, seen_s = summary.terms, self._load.seen_s
        if not summary.is_settled:
            return f"the workers of {summary.ratio} are not all ready, or others drain"
        if not summary.knows_latency:
            return "too few steps were measured to predict others"
        if seen_s < MIN_SHARE_SEEN * terms.horizon_s:
            return f"{seen_s:.0f} s were seen, of at least {MIN_SHARE_SEEN * terms.horizon_s:.0f}"
        if window.num_requests < MIN_REQUESTS:
            return f"{window.num_requests} requests ended in the last horizon, of at least {MIN_REQUESTS}"
        if window.forecast_rate <= 0:
            return "no request is expected"
        if next(iter(_nearest(summary)), None) is None:
            return f"no other ratio is allowed beside {summary.ratio}"
        return None

    def _stay(
        self, summary: Summary, window: Window, reason: str, candidates: Sequence[Candidate] = ()
    ) -> Advice:
        return self._advice(summary, window, None, reason, candidates)

    def _advice(
        self,
        summary: Summary,
        window: Window,
        to: Ratio | None,
        reason: str,
        candidates: Sequence[Candidate],
    ) -> Advice:
        return Advice(
            number=summary.number,
            at_s=summary.at_s,
            made_for=summary.ratio,
            to=to,
            reason=reason,
            window=window,
            candidates=tuple(candidates),
            trust=self._calibration.trust,
            checks=self._calibration.checks,
        )

    # candidates

    def _weigh(self, summary: Summary, window: Window, requests: Sequence[SeenRequest]) -> list[Candidate]:
        """Returns the candidates, the one with the highest net gain first; the present ratio is one."""
        present, others = summary.ratio, _nearest(summary)
        base = _replay(summary, present, requests, window.forecast_rate)
        self._decided = _Decided(summary.at_s, present, window, base.mean_e2e_s)
        screened: list[Candidate] = []
        if summary.terms.objective is Objective.GOODPUT and fmean(base.shares()) >= 1 - MARGIN:
            others = []  # none could bring as much as a change has to
        few = requests[-(len(requests) // FIRST_LOOK) :]
        if len(others) > NUM_FINALISTS and len(few) >= MIN_REQUESTS:
            first = _replay(summary, present, few, window.forecast_rate)
            looks = self._compare(summary, window, few, first, others)
            screened = [structs.replace(look, is_screened_out=True) for look in looks[NUM_FINALISTS:]]
            others = [look.ratio for look in looks[:NUM_FINALISTS]]
        found = self._compare(summary, window, requests, base, [present, *others])
        return found + screened

    def _compare(
        self,
        summary: Summary,
        window: Window,
        requests: Sequence[SeenRequest],
        base: _Replay,
        ratios: Sequence[Ratio],
    ) -> list[Candidate]:
        """Returns the ratios on these requests, the one with the highest net gain first; `base` is how the
        present one did."""
        rate = window.forecast_rate
        # fewer instances may be better at a lower cost
        max_bad = base.max_bad if summary.terms.objective is Objective.GOODPUT else None
        found = []
        for ratio in ratios:
            served = base if ratio == summary.ratio else _replay(summary, ratio, requests, rate, max_bad)
            found.append(self._judge(summary, requests, ratio, rate, base, served))
        return sorted(found, key=lambda candidate: candidate.cost - candidate.gain)

    def _judge(
        self,
        summary: Summary,
        requests: Sequence[SeenRequest],
        ratio: Ratio,
        rate: float,
        base: _Replay,
        served: _Replay,
    ) -> Candidate:
        terms = summary.terms
        worth = 0.0
        if terms.objective is Objective.COST:
            worth = INSTANCE_SHARE * (summary.ratio.num_instances - ratio.num_instances)
        differences = [
            theirs - ours + worth for theirs, ours in zip(served.shares(), base.shares(), strict=True)
        ]
        low = fmean(differences) - STUDENT * stdev(differences) / sqrt(len(differences))
        attainment = fmean(served.shares())
        paid = price(summary, ratio, requests, rate * fmean(base.shares()), base.mean_e2e_s)
        served_s = max(0.0, terms.horizon_s - paid.delay_s)
        return Candidate(
            ratio=ratio,
            goodput=rate * attainment,
            attainment=attainment,
            gain=rate * served_s * (low * self._calibration.trust if low > 0 else low),
            cost=paid.num_requests,
            is_screened_out=not served.is_whole,
        )

    def _choose(self, summary: Summary, window: Window, candidates: Sequence[Candidate]) -> Advice:
        best = next(
            (c for c in candidates if c.ratio != summary.ratio and not c.is_screened_out), candidates[0]
        )
        if len(candidates) == 1:
            share = f"{candidates[0].attainment:.1%} of the requests are good at {summary.ratio}"
            return self._stay(summary, window, f"{share}: no change could pay", candidates)
        requests = window.forecast_rate * summary.terms.horizon_s
        factor = RETURN_FACTOR if self._takes_back(summary, best.ratio) else 1.0
        needed = factor * (best.cost + MARGIN * requests)
        if best.ratio == summary.ratio or best.gain <= needed:
            reason = (
                f"{best.ratio} would bring {best.gain:.3g} good requests in {summary.terms.horizon_s:g} s, of"
                f" at least {needed:.3g} ({best.cost:.3g} for the change)"
            )
            return self._stay(summary, window, reason, candidates)
        if self._calibration.trust < LEAST_TRUST:
            reason = (
                f"{best.ratio} would be better, but the latest predictions were wrong by"
                f" {1 - self._calibration.trust:.0%}"
            )
            return self._stay(summary, window, reason, candidates)
        reason = (
            f"{best.ratio} brings {best.gain:.3g} good requests in {summary.terms.horizon_s:g} s, with 95 %"
            f" confidence, and costs {best.cost:.3g}"
        )
        return self._advice(summary, window, best.ratio, reason, candidates)

    def _takes_back(self, summary: Summary, ratio: Ratio) -> bool:
        if self._left is None:
            return False
        left, at_s = self._left
        return ratio == left and summary.at_s - at_s < 2 * summary.terms.horizon_s


def _loads(window: Window) -> tuple[float, float]:
    """Returns tokens per second that prefill computes, and that decode does."""
    new = window.mean_prompt_tokens - window.mean_cached_tokens
    return window.rate * new, window.rate * window.mean_output_tokens


def _nearest(summary: Summary) -> list[Ratio]:
    """Returns the allowed ratios that take the fewest instances to flip, start or stop."""
    present = summary.ratio

    def distance(ratio: Ratio) -> tuple[int, int, Ratio]:
        prefill = abs(ratio.num_prefill - present.num_prefill)
        decode = abs(ratio.num_decode - present.num_decode)
        return max(prefill, decode), prefill + decode, ratio

    # fewer instances never serve more: only a lower cost is a reason to give some back
    least = present.num_instances if summary.terms.objective is Objective.GOODPUT else 0
    others = (
        ratio for ratio in summary.terms.bounds.ratios() if ratio != present and ratio.num_instances >= least
    )
    return sorted(others, key=distance)[:MAX_CANDIDATES]


def _replay(
    summary: Summary,
    ratio: Ratio,
    requests: Sequence[SeenRequest],
    rate: float,
    max_bad: int | None = None,
) -> _Replay:
    """Replays the requests at `rate`; given up once more than `max_bad` are bad, as all that are left count
    then."""
    terms = summary.terms
    coarser = max(1, BLOCK_TOKENS // terms.layout.block_size)
    layout = structs.replace(terms.layout, block_size=coarser * terms.layout.block_size)
    cluster = VirtualCluster(_shapes(summary, ratio, coarser), layout, terms.router)
    slo = Slo(ttft=terms.ttft_slo_s * 1e3, tpot=terms.itl_slo_s * 1e3)
    num_bad = 0

    def is_enough(request: ServedRequest) -> bool:
        nonlocal num_bad
        num_bad += bool(request.misses(slo))
        return max_bad is not None and num_bad > max_bad

    served = cluster.serve(arrivals(requests, rate, terms.max_model_len), is_enough)
    times = [one.e2e_s for one in served if one.e2e_s is not None]
    are_good = [not one.misses(slo) for one in served]
    are_good += [False] * (len(requests) - len(served))
    is_whole = max_bad is None or num_bad <= max_bad
    return _Replay(tuple(are_good), fmean(times) if times else 0.0, is_whole)


def _shapes(summary: Summary, ratio: Ratio, coarser: int) -> list[InstanceShape]:
    """Returns the instances of a ratio: those that are there, prefill first, then new ones like them. Blocks
    are so many times as large."""
    terms = summary.terms
    there = sorted(summary.instances, key=lambda one: one.role is not Role.PREFILL)
    durations = Durations.learnt(summary.latency)
    num_blocks = round(fmean(one.num_blocks for one in there))
    shapes = []
    for index in range(ratio.num_instances):
        role = Role.PREFILL if index < ratio.num_prefill else Role.DECODE
        limits = terms.prefill if role is Role.PREFILL else terms.decode
        facts = there[index] if index < len(there) else InstanceFacts(role, num_blocks, 1.0, 1.0)
        shapes.append(
            InstanceShape(
                role=role,
                durations=durations.slowed(facts.prefill_factor, facts.decode_factor),
                num_blocks=facts.num_blocks // coarser,
                max_model_len=terms.max_model_len,
                max_batch_tokens=limits.max_batch_tokens,
                max_batch_size=limits.max_batch_size,
            )
        )
    return shapes
