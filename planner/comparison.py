"""Compares all splits of some devices on one load: the highest rate that each sustains, and what limits it.

The goodput of a split is the highest rate at which a target share of requests meets every objective
(DistServe, section 2). Attainment falls as the rate grows, up to noise, so bisection finds it; all splits get
the same requests, with the same gaps but for a factor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import exp, log, sqrt
from multiprocessing import get_context
from statistics import fmean, stdev

from ..core.errors import CapacityError, ConfigError
from ..core.messages import Role
from ..loadgen.slo import Slo
from .offered_load import OfferedLoad
from .splits import Site, Split, Trial

PRECISION = 0.03  # of a goodput, relative
MAX_FACTOR = 64.0  # rates are tried up to this multiple of the offered one, and down to its inverse
NUM_FINALISTS = 3
NUM_SEEDS = 5  # that finalists are compared under
# two-sided 95 % points of Student's t by degrees of freedom
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Question:
    """The load and the objectives that every split is tried on."""

    site: Site
    load: OfferedLoad
    slo: Slo
    target: float  # share of requests that are to meet every objective

    def attains(self, split: Split, rate: float, seed: int) -> bool:
        return self.site.attains(split, self.load, rate, self.slo, self.target, seed)

    def goodput(self, split: Split, seed: int, near: float | None = None) -> float:
        """Returns the highest rate, in requests a second, at which the target is met; 0 where none is. A rate
        that it is expected `near` saves trials."""
        offered = self.load.rate
        low, high = offered / MAX_FACTOR, offered * MAX_FACTOR
        factor = 2.0 if near is None else 1.1
        rate = near or offered
        if self.attains(split, rate, seed):
            low = rate
            while low < high and self.attains(split, low * factor, seed):
                low *= factor
            high = min(high, low * factor)
        else:
            high = rate
            while high > low and not self.attains(split, high / factor, seed):
                high /= factor
            if high <= low:
                return 0.0
            low = high / factor
        while high > low * (1 + PRECISION):
            middle = sqrt(low * high)
            if self.attains(split, middle, seed):
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class Margin:
    """How much more the best split sustains than another one: a ratio, with its 95 % confidence interval over
    seeds."""

    ratio: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        return self.low > 1.0

    @classmethod
    def of(cls, best: Sequence[float], other: Sequence[float]) -> "Margin | None":
        """Compares goodputs under the same seeds; None where the other sustains nothing."""
        if min(other) <= 0:
            return None
        logs = [log(a / b) for a, b in zip(best, other, strict=True)]
        mean = fmean(logs)
        half = _STUDENT[len(logs) - 1] * stdev(logs) / sqrt(len(logs))
        return cls(exp(mean), exp(mean - half), exp(mean + half))


@dataclass(frozen=True)
class RankedSplit:
    """A split and how it did."""

    split: Split
    goodput: float  # requests per second; under the first seed, or for finalists the mean over all
    at_offered: Trial
    at_best: Trial  # at the goodput of the best split
    margin: Margin | None = None  # of the best one over this one; finalists only


@dataclass(frozen=True)
class Comparison:
    """The answer: splits by goodput, and those that the devices cannot hold."""

    ranked: tuple[RankedSplit, ...]
    impossible: tuple[tuple[Split, str], ...]

    @property
    def best(self) -> RankedSplit:
        return self.ranked[0]


Progress = Callable[[str], None]


def compare(
    question: Question, splits: Iterable[Split], num_processes: int, progress: Progress = lambda _: None
) -> Comparison:
    """Raises ConfigError where no split fits, or none meets the objectives at any rate."""
    possible, impossible = _fitting(question, splits)
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        progress(f"trying {len(possible)} splits")
        found = pool.map(partial(_goodput, question), [(split, 0, None) for split in possible])
        goodputs = dict(zip(possible, found, strict=True))
        finalists = _finalists(question, goodputs)
        progress(f"comparing {', '.join(map(str, finalists))} under {NUM_SEEDS} seeds")
        tasks = [(split, seed, goodputs[split]) for seed in range(1, NUM_SEEDS) for split in finalists]
        samples = {split: [goodputs[split]] for split in finalists}
        for (split, _, _), goodput in zip(tasks, pool.map(partial(_goodput, question), tasks), strict=True):
            samples[split].append(goodput)
        goodputs |= {split: fmean(values) for split, values in samples.items()}
        order = sorted(possible, key=lambda split: -goodputs[split])
        best = order[0]
        progress("finding out what limits them")
        trials = list(pool.map(partial(_trials, question, goodputs[best]), order))
    ranked = tuple(
        RankedSplit(
            split,
            goodputs[split],
            at_offered,
            at_best,
            Margin.of(samples[best], samples[split]) if split in samples and split != best else None,
        )
        for split, (at_offered, at_best) in zip(order, trials, strict=True)
    )
    return Comparison(ranked, tuple(impossible))


def _fitting(question: Question, splits: Iterable[Split]) -> tuple[list[Split], list[tuple[Split, str]]]:
    """Returns the splits whose instances hold the model, and the others, each with the reason."""
    possible: list[Split] = []
    impossible: list[tuple[Split, str]] = []
    for split in splits:
        try:
            question.site.shapes(split)
            possible.append(split)
        except CapacityError as error:
            impossible.append((split, str(error)))
    if not possible:
        raise ConfigError(impossible[0][1])
    return possible, impossible


def _finalists(question: Question, goodputs: Mapping[Split, float]) -> list[Split]:
    """Returns the splits that are compared under more seeds: the best few, and the colocated one."""
    order = sorted((split for split in goodputs if goodputs[split]), key=lambda split: -goodputs[split])
    if not order:
        first = next(iter(goodputs))
        rate = question.load.rate / MAX_FACTOR
        alone = question.site.try_out(first, question.load, rate, question.slo, 0)
        raise ConfigError(
            f"slo: {question.slo} is met by no split at any rate: at {rate:.3g} requests/s {first} reaches"
            f" {alone.attainment:.1%}, expected {question.target:.0%}"
        )
    return list(dict.fromkeys((*order[:NUM_FINALISTS], *(split for split in order if split.is_colocated))))


def _goodput(question: Question, task: tuple[Split, int, float | None]) -> float:
    split, seed, near = task
    return question.goodput(split, seed, near)


def _trials(question: Question, best_rate: float, split: Split) -> tuple[Trial, Trial]:
    """Returns what the split does at the offered rate, and at the rate that the best one sustains."""
    at_offered, at_best = (
        question.site.try_out(split, question.load, rate, question.slo, 0)
        for rate in (question.load.rate, best_rate)
    )
    return at_offered, at_best


def limits_of(trial: Trial) -> str:
    """Returns in a few words why requests missed their objectives."""
    if not trial.misses:
        return "nothing: every request met its objectives"
    worst = max(trial.misses, key=lambda name: trial.misses[name])
    share = trial.misses[worst] / trial.num_requests
    if worst == "failed":
        return f"{share:.0%} of the requests fail: too long for an instance"
    if worst in ("ttft", "e2e"):
        return f"{share:.0%} miss {worst.upper()}: {_why_late(trial)}"
    return f"{share:.0%} miss {worst.upper()}: {_why_slow(trial)}"


def _why_late(trial: Trial) -> str:
    role = Role.DECODE if trial.split.is_colocated else Role.PREFILL
    if trial.kv_shares.get(Role.DECODE, 0.0) > 0.97:
        return f"prompts wait for KV blocks of decode instances ({trial.num_preemptions} preemptions)"
    if trial.link_share > 0.9:
        return f"the links are busy {trial.link_share:.0%} of the time"
    if trial.busy_shares.get(role, 0.0) > 0.85:
        return f"prompts queue, {role.value} instances are busy {trial.busy_shares[role]:.0%} of the time"
    return "prompts wait for each other in bursts, or take as long alone"


def _why_slow(trial: Trial) -> str:
    if trial.num_preemptions > 0.01 * trial.num_requests:
        return f"{trial.num_preemptions} preemptions, as KV blocks run out"
    if trial.split.is_colocated or trial.split.prefills_on_decode:
        return "prompts delay the tokens of those that share their steps"
    busy = trial.busy_shares.get(Role.DECODE, 0.0)
    return f"decode instances are busy {busy:.0%} of the time, with large batches"
