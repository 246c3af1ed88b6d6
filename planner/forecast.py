"""Forecasts of the arrival rate over the next horizon, from the rates of past bins of equal length.

`bench/reproduction/forecasts.py` compares them on recorded traces."""

from collections.abc import Callable, Sequence
from math import ceil

BINS_PER_HORIZON = 6
MAX_BINS = 4 * BINS_PER_HORIZON  # older ones are forgotten
LEVEL_WEIGHT, TREND_WEIGHT = 0.4, 0.1  # of the newest bin
TREND_KEPT = 0.8  # of a trend, from one bin to the next: none goes on for ever
PEAK_QUANTILE = 0.9

Forecast = Callable[[Sequence[float]], float]


def last_window(rates: Sequence[float]) -> float:
    """Returns the mean rate over the last horizon."""
    latest = rates[-BINS_PER_HORIZON:]
    return sum(latest) / len(latest)


def smoothed_trend(rates: Sequence[float]) -> float:
    """Returns the mean of the next horizon under exponential smoothing with a damped trend (Gardner and
    McKenzie, Management Science 31, 1985)."""
    level, trend = rates[0], 0.0
    for rate in rates[1:]:
        expected = level + TREND_KEPT * trend
        new = LEVEL_WEIGHT * rate + (1 - LEVEL_WEIGHT) * expected
        trend = TREND_WEIGHT * (new - level) + (1 - TREND_WEIGHT) * TREND_KEPT * trend
        level = new
    steps = [sum(TREND_KEPT**i for i in range(1, bin_ + 1)) for bin_ in range(1, BINS_PER_HORIZON + 1)]
    return max(0.0, level + trend * sum(steps) / len(steps))


def recent_peaks(rates: Sequence[float]) -> float:
    """Returns a rate that few of the recent bins exceeded."""
    return sorted(rates)[ceil(PEAK_QUANTILE * len(rates)) - 1]


FORECASTS: dict[str, Forecast] = {
    "last window": last_window,
    "smoothed trend": smoothed_trend,
    "recent peaks": recent_peaks,
}
