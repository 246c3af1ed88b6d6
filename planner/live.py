"""The live planner's decisions: whether another ratio serves better than the present one from now on, the
change included.

    Summary --observe--> SeenLoad, Calibration
    is_due: the utilisation of both pools, at each ratio
    decide: replay of the present ratio and of the best few, from what is being served now -> gain -> Advice

Every replay has the same requests, so that their differences can be compared one by one. What they bring
differs in the long run of a replay, as queues grow or shrink; noise is what differs from one stretch to the
next: the confidence interval rests on mean square successive differences (von Neumann et al., Annals of
Mathematical Statistics 12, 1941). No clock and no I/O."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from random import Random
from statistics import fmean

from ..router.planning import Advice, Candidate, Objective, Ratio, Summary, Window
from .calibration import Calibration
from .changes import Change
from .demand import Demand, demand
from .forecast import recent_peaks
from .replay import Outlook, Replay, outlook, replay
from .seen_load import MIN_BEGUN, MIN_RECENT, Recent, SeenLoad, window_of

NUM_STRETCHES = 12  # of a replay
CONFIDENCE = 2.2  # two-sided 95 % point of Student's t, with 11 degrees of freedom
NUM_FINALISTS = 2  # ratios that are replayed beside the present one
BETTER = 0.9  # of the present ratio's utilisation: at most that of one that is worth a replay
NEARLY_BEST = 1.25  # of the lowest utilisation: at most that of another one
BUSY = 0.6  # utilisation below which no change can pay, where requests are good
NEARLY = 0.9  # of the highest gain: another one is about as good
MARGIN = 0.03  # of the requests of a replay: what a change has to bring
INSTANCE_SHARE = 0.03  # under the objective "cost", an instance counts as much as this share of the requests
LEAST_TRUST = 0.5
NUM_STEADY_HORIZONS = 4  # between decisions that nothing asks for
PATIENCE = 0.25  # of a horizon, until others are replayed again for the same load; it doubles each time
OTHER_MIX = 0.1  # absolute: another share of prompts in all work is another load,
MORE_LOAD = 1.3  # and so is so many times the utilisation
RETURN_FACTOR = 2.0  # of the margin, for a change that takes back the last one, for two horizons


@dataclass(frozen=True)
class _View:
    """The facts of one summary of the load."""

    summary: Summary
    recent: Recent
    rate: float
    long_rate: float  # the mean of some horizons
    window: Window
    demand: Demand | None  # None: nothing came, or workers are not ready


@dataclass(frozen=True)
class _Decided:
    """The latest decision for which ratios were replayed."""

    at_s: float
    ratio: Ratio
    mix: float
    utilisation: float
    patience_s: float  # until the same load asks for another one

    def is_like(self, ratio: Ratio, demand: Demand) -> bool:
        """Whether prompts and outputs ask for about the same shares of the instances, and not for more."""
        return (
            ratio == self.ratio
            and abs(demand.mix - self.mix) <= OTHER_MIX
            and demand.utilisation(ratio) <= MORE_LOAD * self.utilisation
        )


class LivePlanner:
    """Fed with every summary in order; `decide` looks at what is known then."""

    def __init__(self) -> None:
        self._load = SeenLoad()
        self._calibration = Calibration()
        self._view: _View | None = None
        self._left: tuple[Ratio, float] | None = None  # the ratio before the last change, and when that was
        self._decided: _Decided | None = None
        self.num_replayed_tokens = 0  # as `Outlook.num_tokens` counts them

    def observe(self, summary: Summary) -> None:
        if self._view is not None and summary.ratio != self._view.summary.ratio:
            self._left = self._view.summary.ratio, summary.at_s
        self._load.add(summary)
        self._calibration.observe(summary)
        recent = self._load.recent(Random(summary.number))
        rate, rates = recent.rate, self._load.rates()
        long_rate = fmean(rates) if rates else rate
        if summary.terms.objective is Objective.COST and rates:
            rate = max(rate, recent_peaks(rates))
        found = None
        if recent.requests and _is_ready(summary):
            found = demand(summary, recent.requests, rate, recent.waiting)
        self._view = _View(summary, recent, rate, long_rate, window_of(recent, summary, rate), found)

    @property
    def is_due(self) -> bool:
        """Whether another ratio may be better, or the time since the last decision gives reason for another
        one."""
        view, last = self._view, self._decided
        if view is None or last is None:
            return True
        age_s = view.summary.at_s - last.at_s
        if age_s >= NUM_STEADY_HORIZONS * view.summary.terms.horizon_s:
            return True
        if view.demand is None or not self._finalists(view):
            return False
        return age_s >= last.patience_s or not last.is_like(view.summary.ratio, view.demand)

    def decide(self) -> Advice:
        """Returns the advice that follows from the latest summary; there must be one."""
        view = self._view
        assert view is not None
        why_not = self._why_not(view)
        if why_not is not None:
            return self._advice(view, None, why_not)
        summary = view.summary
        others = self._finalists(view)
        self._remember(view)
        what = outlook(summary, view.recent, view.rate, Random(summary.number))
        candidates = self._weigh(view, what, others)
        predicted = {one.ratio: one.attainment for one in candidates if not one.is_screened_out}
        self._calibration.predict(summary.at_s, summary.terms.horizon_s, predicted)
        return self._choose(view, what.num_requests, candidates)

    def _remember(self, view: _View) -> None:
        summary, last = view.summary, self._decided
        assert view.demand is not None
        patience_s = PATIENCE * summary.terms.horizon_s
        if last is not None and last.is_like(summary.ratio, view.demand):
            patience_s = 2 * last.patience_s
        utilisation = view.demand.utilisation(summary.ratio)
        self._decided = _Decided(summary.at_s, summary.ratio, view.demand.mix, utilisation, patience_s)

    def _why_not(self, view: _View) -> str | None:
        """Returns why nothing can be said yet."""
        summary = view.summary
        if not _is_ready(summary):
            return f"the workers of {summary.ratio} are not all ready, or others drain"
        if not summary.knows_latency:
            return "too few steps were measured to predict others"
        if len(view.recent.requests) < MIN_RECENT:
            return f"{len(view.recent.requests)} requests came lately, of at least {MIN_RECENT}"
        if view.recent.num_begun < MIN_BEGUN:
            return f"{view.recent.num_begun} outputs have begun, of at least {MIN_BEGUN}"
        if not _others(summary):
            return f"no other ratio is allowed beside {summary.ratio}"
        return None

    def _advice(
        self, view: _View, to: Ratio | None, reason: str, candidates: Sequence[Candidate] = ()
    ) -> Advice:
        summary = view.summary
        return Advice(
            number=summary.number,
            at_s=summary.at_s,
            made_for=summary.ratio,
            to=to,
            reason=reason,
            window=view.window,
            candidates=tuple(candidates),
            trust=self._calibration.trust,
            checks=self._calibration.checks,
        )

    # candidates

    def _finalists(self, view: _View) -> tuple[Ratio, ...]:
        """Returns the ratios that are worth a replay, if any."""
        summary, found = view.summary, view.demand
        if found is None:
            return ()
        if summary.terms.objective is Objective.COST:
            return tuple(
                sorted(_others(summary), key=lambda one: _distance(summary.ratio, one))[: NUM_FINALISTS * 2]
            )
        present = found.utilisation(summary.ratio)
        if present < BUSY and view.recent.share_good >= 1 - MARGIN:
            return ()
        others = sorted((found.utilisation(one), one) for one in _others(summary))
        most = min(BETTER * present, NEARLY_BEST * others[0][0]) if others else 0.0
        return tuple(ratio for utilisation, ratio in others[:NUM_FINALISTS] if utilisation <= most)

    def _weigh(self, view: _View, what: Outlook, others: Sequence[Ratio]) -> list[Candidate]:
        """Returns the candidates, the one with the highest net gain first; the present ratio is one."""
        summary = view.summary
        base = replay(summary, summary.ratio, what)
        # fewer instances may be better at a lower cost
        max_bad = None
        if summary.terms.objective is Objective.GOODPUT:
            max_bad = base.num_bad + round(view.long_rate * base.late_s)
            if max_bad <= MARGIN * what.num_requests:
                others = ()
        served = {summary.ratio: base} | {one: replay(summary, one, what, max_bad) for one in others}
        self.num_replayed_tokens += len(served) * what.num_tokens
        found = [self._judge(view, what, ratio, base, one) for ratio, one in served.items()]
        return sorted(found, key=lambda candidate: -candidate.gain)

    def _judge(self, view: _View, what: Outlook, ratio: Ratio, base: Replay, served: Replay) -> Candidate:
        terms = view.summary.terms
        worth = 0.0
        if terms.objective is Objective.COST:
            worth = INSTANCE_SHARE * (view.summary.ratio.num_instances - ratio.num_instances)
        pairs = list(zip(served.are_good, base.are_good, strict=True))
        differences = [theirs - ours + worth for theirs, ours in pairs]
        # and those that come behind the replay, to a queue that is left
        low = lower_end(differences) + view.long_rate * (base.late_s - served.late_s)
        return Candidate(
            ratio=ratio,
            goodput=view.rate * served.attainment,
            attainment=served.attainment,
            gain=low * self._calibration.trust if low > 0 else low,
            cost=sum(ours and not theirs for theirs, ours in pairs),
            is_screened_out=not served.is_whole,
        )

    def _choose(self, view: _View, num_requests: int, candidates: Sequence[Candidate]) -> Advice:
        summary = view.summary
        whole = [one for one in candidates if one.ratio != summary.ratio and not one.is_screened_out]
        if not whole:
            share = next(one.attainment for one in candidates if one.ratio == summary.ratio)
            reason = f"{share:.1%} of the requests are good at {summary.ratio}: no other ratio brings more"
            return self._advice(view, None, reason, candidates)
        best = whole[0]
        if (
            found := view.demand
        ) is not None and best.gain > 0:  # of about the same gain, the one with more to spare
            alike = [one for one in whole if one.gain >= NEARLY * best.gain]
            best = min(alike, key=lambda one: found.utilisation(one.ratio))
        needed = MARGIN * num_requests * (RETURN_FACTOR if self._takes_back(summary, best.ratio) else 1.0)
        brings = f"{best.gain:.3g} good requests of {num_requests}"
        if best.gain <= needed:
            reason = f"{best.ratio} would bring {brings}, of at least {needed:.3g}"
            return self._advice(view, None, reason, candidates)
        if self._calibration.trust < LEAST_TRUST:
            wrong = f"{1 - self._calibration.trust:.0%}"
            reason = f"{best.ratio} would be better, but the latest predictions were wrong by {wrong}"
            return self._advice(view, None, reason, candidates)
        reason = f"{best.ratio} brings {brings}, with 95 % confidence"
        return self._advice(view, best.ratio, reason, candidates)

    def _takes_back(self, summary: Summary, ratio: Ratio) -> bool:
        if self._left is None:
            return False
        left, at_s = self._left
        return ratio == left and summary.at_s - at_s < 2 * summary.terms.horizon_s


def _is_ready(summary: Summary) -> bool:
    """Whether the instances of the ratio are all ready, none of them set apart, and no others are left."""
    there = Counter(one.role for one in summary.instances)
    return summary.is_settled and all(there[role] == size for role, size in summary.ratio.sizes.items())


def lower_end(differences: Sequence[float]) -> float:
    """Returns the lower end of the 95 % confidence interval of their sum."""
    size = len(differences) / NUM_STRETCHES
    cuts = [round(number * size) for number in range(NUM_STRETCHES + 1)]
    sums = [sum(differences[start:end]) for start, end in pairwise(cuts)]
    square = sum((later - earlier) ** 2 for earlier, later in pairwise(sums)) / (2 * (NUM_STRETCHES - 1))
    return sum(sums) - CONFIDENCE * sqrt(NUM_STRETCHES * square)


def _distance(present: Ratio, ratio: Ratio) -> tuple[int, Ratio]:
    return Change.between(present, ratio, can_flip=True).num_steps, ratio


def _others(summary: Summary) -> list[Ratio]:
    """Returns the other ratios that are allowed."""
    # fewer instances never serve more: only a lower cost is a reason to give some back
    least = summary.ratio.num_instances if summary.terms.objective is Objective.GOODPUT else 0
    return [
        ratio
        for ratio in summary.terms.bounds.ratios()
        if ratio != summary.ratio and ratio.num_instances >= least
    ]
