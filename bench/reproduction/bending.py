"""Placement that bends before the ratio does: decode instances take prompts, and prefill instances decode.

    python -m bench.reproduction.bending bursts      beside arXiv 2607.02043: P95 TTFT down by up to 81 %
    python -m bench.reproduction.bending overload    throughput beyond capacity beside colocated instances

OPT-13B on A100; `routing.prefill_on_decode` is `never` or `auto`. Bursts are gamma arrivals with lognormal
prompts (coefficient of variation 1.5) on 2P2D. Throughput is that of the time in which requests come."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from pdserve.loadgen.slo import Slo
from pdserve.planner.virtual_cluster import Arrival, ServedRequest

from .profiles import OPT_13B_A100

BURST_SLO = Slo(ttft=2000.0, tpot=100.0)
BURST_RATES = (12.0, 16.0)
SHAPES = {"even": (512, 64), "long prompts": (1500, 64), "long outputs": (200, 300)}
OVERLOAD_ITL_S = 0.04
DURATION_S = 60.0


@dataclass(frozen=True)
class Served:
    """A load, and how it was served."""

    requests: Sequence[ServedRequest]
    duration_s: float  # of the arrivals

    @property
    def tokens_per_s(self) -> float:
        """Returns the tokens that came while requests came."""
        num_tokens = sum(at_s < self.duration_s for one in self.requests for at_s in one.token_s)
        return num_tokens / self.duration_s

    def ttft_s(self, percent: float) -> float:
        return float(np.percentile([one.token_s[0] - one.arrived_s for one in self.requests], percent))

    def gap_s(self, percent: float) -> float:
        return float(np.percentile(np.concatenate([np.diff(one.token_s) for one in self.requests]), percent))

    def attainment(self, slo: Slo) -> float:
        return sum(not one.misses(slo) for one in self.requests) / len(self.requests)


def bursts(rate: float, seed: int, duration_s: float = DURATION_S) -> list[Arrival]:
    """Returns requests with a coefficient of variation of 3 between arrivals, and heavy-tailed prompts."""
    rng = Random(seed)
    shape, sigma = 1 / 9, 1.086  # of gamma; of a lognormal with a coefficient of variation of 1.5
    found: list[Arrival] = []
    at_s = 0.0
    while (at_s := at_s + rng.gammavariate(shape, 1 / (shape * rate))) < duration_s:
        prompt = min(4000, max(16, round(rng.lognormvariate(np.log(800) - sigma**2 / 2, sigma))))
        found.append(Arrival(at_s, (len(found),) * prompt, rng.randint(8, 120)))
    return found


def steady(rate: float, lengths: tuple[int, int], seed: int, duration_s: float = DURATION_S) -> list[Arrival]:
    """Returns Poisson arrivals of requests alike: tokens of prompt and output."""
    rng = Random(seed)
    found: list[Arrival] = []
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(rate)) < duration_s:
        found.append(Arrival(at_s, (len(found),) * lengths[0], lengths[1]))
    return found


def serve(split: tuple[int, int], bends: bool, itl_slo_s: float, arrivals: Sequence[Arrival]) -> Served:
    """Serves requests on so many prefill and decode instances."""
    cluster = OPT_13B_A100.cluster(*split, itl_slo_s, bends)
    return Served(cluster.serve(arrivals), arrivals[-1].at_s)


def beyond_capacity(
    lengths: tuple[int, int], factor: float, duration_s: float = DURATION_S
) -> Iterator[Served]:
    """Yields what two colocated instances, 1P1D that does not bend, and 1P1D that does make of `factor` times
    a rate that fills two instances."""
    prompt, output = lengths
    durations = OPT_13B_A100.durations
    request_s = durations.prefill_token_s * prompt + output * (
        durations.decode_large.sequence_s + durations.decode_large.context_token_s * (prompt + output / 2)
    )
    arrivals = steady(factor * 2 / request_s, lengths, 0, duration_s)
    for split, bends in (((0, 2), True), ((1, 1), False), ((1, 1), True)):
        yield serve(split, bends, OVERLOAD_ITL_S, arrivals)


def show_bursts(num_seeds: int, duration_s: float) -> None:
    print("rate   P95 TTFT never     auto  change   good never    auto      P99 gap")
    for rate in BURST_RATES:
        never, auto = (
            [serve((2, 2), bends, 0.1, bursts(rate, seed, duration_s)) for seed in range(1, num_seeds + 1)]
            for bends in (False, True)
        )
        ttft = [float(np.mean([one.ttft_s(95) for one in some])) for some in (never, auto)]
        good = [float(np.mean([one.attainment(BURST_SLO) for one in some])) for some in (never, auto)]
        gaps = [float(np.mean([one.gap_s(99) for one in some])) for some in (never, auto)]
        print(
            f"{rate:>4.0f} {ttft[0]:>16.2f} s {ttft[1]:>6.2f} s {ttft[1] / ttft[0] - 1:>7.0%}"
            f" {good[0]:>12.1%} {good[1]:>7.1%} {gaps[0] * 1e3:>5.0f} -> {gaps[1] * 1e3:.0f} ms",
            flush=True,
        )


def show_overload() -> None:
    print(
        f"{'load':<14} {'times':>5} {'2 colocated':>12} {'1P1D never':>11} {'auto':>7} {'of colocated':>13}"
    )
    for name, lengths in SHAPES.items():
        for factor in (1.0, 1.5):
            colocated, never, auto = (one.tokens_per_s for one in beyond_capacity(lengths, factor))
            print(
                f"{name:<14} {factor:>5.1f} {colocated:>12.0f} {never:>11.0f} {auto:>7.0f}"
                f" {auto / colocated:>13.1%}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("bursts", "overload"))
    parser.add_argument("--seeds", type=int, default=5, help="of bursts")
    parser.add_argument("--duration", type=float, default=DURATION_S, help="of bursts, in seconds")
    options = parser.parse_args()
    if options.part == "bursts":
        show_bursts(options.seeds, options.duration)
    else:
        show_overload()


if __name__ == "__main__":
    main()
