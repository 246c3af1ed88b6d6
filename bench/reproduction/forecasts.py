"""Forecasts of arrival rates, compared on recorded traces: the error of the predicted mean rate of the next
horizon, relative to the trace's mean rate.

    python -m bench.reproduction.forecasts TRACE... [--horizon 120] [--speed 1]"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pdserve.loadgen.trace import parse_trace
from pdserve.planner.forecast import BINS_PER_HORIZON, FORECASTS, MAX_BINS


def rates_of(instants: Sequence[float], bin_s: float) -> list[float]:
    """Returns the arrivals per second of each whole bin."""
    counts = [0] * int(instants[-1] / bin_s)
    for at_s in instants:
        if (index := int(at_s / bin_s)) < len(counts):
            counts[index] += 1
    return [count / bin_s for count in counts]


def errors(rates: Sequence[float], name: str) -> list[float]:
    """Returns the signed error at the end of each bin that a whole horizon follows."""
    found = []
    for end in range(BINS_PER_HORIZON, len(rates) - BINS_PER_HORIZON + 1):
        came = sum(rates[end : end + BINS_PER_HORIZON]) / BINS_PER_HORIZON
        found.append(FORECASTS[name](rates[max(0, end - MAX_BINS) : end]) - came)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--horizon", type=float, default=120.0)
    parser.add_argument("--speed", type=float, default=1.0)
    options = parser.parse_args()
    print(f"{'trace':<36} {'forecast':<16} {'mean |error|':>12} {'bias':>8} {'under 0.9':>10}")
    for path in options.traces:
        rows = parse_trace(path.read_text().splitlines())
        rates = rates_of([row.offset_s / options.speed for row in rows], options.horizon / BINS_PER_HORIZON)
        mean = sum(rates) / len(rates)
        for name in FORECASTS:
            found = errors(rates, name)
            absolute = sum(map(abs, found)) / len(found) / mean
            bias = sum(found) / len(found) / mean
            short = sum(error < -0.1 * mean for error in found) / len(found)
            print(f"{path.name:<36} {name:<16} {absolute:>12.1%} {bias:>8.1%} {short:>10.1%}")


if __name__ == "__main__":
    main()
