"""Counts of measurements by size, exported as a Prometheus histogram. Plain numbers, cheap enough for every
step and token."""

from bisect import bisect_left
from collections.abc import Sequence

TOKEN_GAPS_S = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


class Histogram:
    """`counts[i]` measurements were at most `bounds[i]` and above the bound before; the last of `counts` is
    for the rest."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0  # sum of all measurements

    @property
    def num_measured(self) -> int:
        return sum(self.counts)

    def add(self, value: float, count: int = 1) -> None:
        """`count` measurements of the same size."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """Merges the measurements of histograms with the same bounds."""
    total = Histogram(histograms[0].bounds)
    for histogram in histograms:
        assert histogram.bounds == total.bounds, "these cannot be added"
        total.counts = [mine + theirs for mine, theirs in zip(total.counts, histogram.counts, strict=True)]
        total.total += histogram.total
    return total


class TokenGaps(Histogram):
    """Times between one token of a choice and the next, as the router forwards them."""

    __slots__ = ("before",)

    def __init__(self) -> None:
        super().__init__(TOKEN_GAPS_S)
        self.before: list[
            float | None
        ] = []  # for each token of the report at hand: when the one before it came, if one did

    def close(self, now_s: float) -> int:
        """The report is through: how many tokens it brought. Streams that go on together cost one comparison
        each."""
        before = self.before
        num_tokens = len(before)
        if not num_tokens:
            return 0
        common = before[0]
        num_common = before.count(common)
        if common is not None:
            self.add(now_s - common, num_common)
        if num_common != num_tokens:
            for last_s in before:
                if last_s is not common and last_s is not None and last_s != common:
                    self.add(now_s - last_s)
        before.clear()
        return num_tokens
