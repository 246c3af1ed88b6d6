"""Summaries of a set of numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Distribution:
    """Percentiles interpolate linearly between neighbours, as numpy, vLLM and aiperf do."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> "Distribution | None":
        """Summarizes values; None for no values."""
        if not len(values):
            return None
        array = np.asarray(values, dtype=np.float64)
        p50, p90, p95, p99 = (float(value) for value in np.percentile(array, PERCENTILES))
        return Distribution(
            len(array), float(array.mean()), float(array.min()), p50, p90, p95, p99, float(array.max())
        )

    def scaled(self, factor: float) -> "Distribution":
        """Converts to another unit."""
        values = asdict(self)
        return Distribution(
            count=values.pop("count"), **{name: value * factor for name, value in values.items()}
        )
