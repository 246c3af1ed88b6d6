"""Two targets that took turns: the ratio of each figure, with a confidence interval.

A round gives one value of a figure for each target. The ratio is that of the values' means over all rounds;
its interval is the percentile bootstrap's (Efron and Tibshirani, An Introduction to the Bootstrap, chapter
13) over rounds drawn with replacement, a round's two values always together: what a busy minute did to both
cancels out. With few rounds such an interval is too narrow (of five rounds it misses the truth one time in
six, of twelve one in eleven, not one in twenty); with one round there is none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .records import Round
from .report import Report, make_report
from .slo import Slo

NUM_RESAMPLES = 10_000

Figure = Callable[[Report], float | None]


def _of_summary(field: str, statistic: str, report: Report) -> float | None:
    summary = getattr(report, field)
    return None if summary is None else float(getattr(summary, statistic))


def _plain(field: str, report: Report) -> float | None:
    return float(getattr(report, field))


FIGURES: dict[str, Figure] = {
    **{
        name: partial(_plain, name)
        for name in ("requests_per_s", "output_tokens_per_s", "goodput_per_s", "good_share")
    },
    **{
        f"{field}.{statistic}": partial(_of_summary, field, statistic)
        for field in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
        for statistic in ("mean", "p50", "p90", "p99")
    },
}


@dataclass(frozen=True)
class FigureRatio:
    """The second target's figure over the first one's."""

    figure: str
    first: float  # means over rounds
    second: float
    ratio: float | None  # None where the first is 0
    low: float | None  # bounds of the 95 % interval; None with fewer than two rounds
    high: float | None


def compare(first: Sequence[Round], second: Sequence[Round], slo: Slo, seed: int = 0) -> list[FigureRatio]:
    """Compares each figure that all rounds of both have. Round i of one is paired with that of the other."""
    pairs = [(make_report([a], slo), make_report([b], slo)) for a, b in zip(first, second, strict=True)]
    ratios = []
    for name, figure in FIGURES.items():
        values = [(figure(a), figure(b)) for a, b in pairs]
        known = [(a, b) for a, b in values if a is not None and b is not None]
        if known and len(known) == len(values):
            ratios.append(ratio_of_means(name, [a for a, _ in known], [b for _, b in known], seed))
    return ratios


def ratio_of_means(
    figure: str, first: Sequence[float], second: Sequence[float], seed: int = 0
) -> FigureRatio:
    """The ratio of the means of values paired by position."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    mean_a, mean_b = float(a.mean()), float(b.mean())
    ratio = mean_b / mean_a if mean_a > 0 else None
    if len(a) < 2 or ratio is None:
        return FigureRatio(figure, mean_a, mean_b, ratio, None, None)
    drawn = np.random.default_rng(seed).integers(len(a), size=(NUM_RESAMPLES, len(a)))
    sums_a, sums_b = a[drawn].sum(axis=1), b[drawn].sum(axis=1)
    ratios = sums_b[sums_a > 0] / sums_a[sums_a > 0]
    low, high = (float(value) for value in np.percentile(ratios, (2.5, 97.5)))
    return FigureRatio(figure, mean_a, mean_b, ratio, low, high)
