"""The due times of an open load's requests: seconds since its start, ascending and without end.

The first request comes after the first gap. Gaps are used as they were drawn; vLLM stretches them so that the
whole run has exactly the requested rate, which removes from a short run the randomness that was requested."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import LoadError

_BLOCK = 256  # gaps drawn at once


class Arrivals(Protocol):
    """A renewal process: independent gaps of one distribution."""

    @property
    def rate(self) -> float:
        """Requests per second in the long run."""
        ...

    def gaps(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` gaps in seconds, float64 [count]."""
        ...


@dataclass(frozen=True)
class Constant:
    """One request every 1 / rate seconds."""

    rate: float

    def gaps(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.full(count, 1 / self.rate)


@dataclass(frozen=True)
class Poisson:
    """Exponential gaps: many clients that do not know of one another."""

    rate: float

    def gaps(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.exponential(1 / self.rate, count)


@dataclass(frozen=True)
class Gamma:
    """Gamma gaps of shape `burstiness` and mean 1 / rate, as vLLM's `--burstiness`: 1 is Poisson, below 1
    requests come in bursts, above 1 more evenly. The gaps' coefficient of variation is burstiness ** -0.5."""

    rate: float
    burstiness: float

    def gaps(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.gamma(self.burstiness, 1 / (self.rate * self.burstiness), count)


def arrival_times(arrivals: Arrivals, rng: np.random.Generator) -> Iterator[float]:
    """The instants, without end."""
    now_s = 0.0
    while True:
        for gap_s in arrivals.gaps(rng, _BLOCK):
            now_s += float(gap_s)
            yield now_s


def make_arrivals(kind: str, rate: float, burstiness: float = 1.0) -> Arrivals:
    """Makes arrivals by their command-line name. Raises LoadError."""
    if not 0 < rate < float("inf"):
        raise LoadError(f"rate: {rate:g} is not valid, expected requests per second above 0")
    if not 0 < burstiness < float("inf"):
        raise LoadError(f"burstiness: {burstiness:g} is not valid, expected a number above 0")
    match kind:
        case "poisson":
            return Poisson(rate)
        case "gamma":
            return Gamma(rate, burstiness)
        case "constant":
            return Constant(rate)
    raise LoadError(f"arrivals: {kind!r} is not valid, expected poisson, gamma or constant")
