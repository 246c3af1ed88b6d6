"""The highest rate at which a share of requests meets every objective, on instances of a profile."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from random import Random

from pdserve.loadgen.slo import Slo
from pdserve.planner.virtual_cluster import Arrival, ServedRequest

from .profiles import Profile

PRECISION = 0.02  # relative


@dataclass(frozen=True)
class Trial:
    """Instances and requests: Poisson arrivals, lengths drawn from `lengths` in turn."""

    profile: Profile
    num_prefill: int
    num_decode: int
    lengths: Sequence[tuple[int, int]]  # prompt and output tokens
    slo: Slo
    target: float = 0.9
    num_requests: int = 500
    seed: int = 0

    def arrivals(self, rate: float) -> list[Arrival]:
        rng = Random(self.seed)
        at_s, found = 0.0, []
        for number in range(self.num_requests):
            at_s += rng.expovariate(1.0) / rate
            prompt, output = self.lengths[number % len(self.lengths)]
            found.append(Arrival(at_s, (number,) * prompt, output))
        return found

    def attains(self, rate: float) -> bool:
        cluster = self.profile.cluster(self.num_prefill, self.num_decode, (self.slo.tpot or 1e6) / 1e3)
        num_left = round((1 - self.target) * self.num_requests)

        def has_failed(request: ServedRequest) -> bool:
            nonlocal num_left
            num_left -= bool(request.misses(self.slo))
            return num_left < 0

        cluster.serve(self.arrivals(rate), has_failed)
        return num_left >= 0

    def rate(self, near: float) -> float:
        """Returns requests per second; `near` is where the search begins."""
        low = high = near
        if self.attains(near):
            while self.attains(high := high * 1.5):
                low = high
        else:
            while not self.attains(low := low / 1.5):
                high = low
        while high > low * (1 + PRECISION):
            middle = sqrt(low * high)
            low, high = (middle, high) if self.attains(middle) else (low, middle)
        return low

    def on(self, num_prefill: int, num_decode: int, slo: Slo) -> "Trial":
        return replace(self, num_prefill=num_prefill, num_decode=num_decode, slo=slo)
