"""Traffic that changes: recorded traces in turns, and synthetic days."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import log, pi, sin, sqrt
from pathlib import Path
from random import Random

from pdserve.loadgen.trace import TraceRow, parse_trace
from pdserve.loadgen.workload import Replayed
from pdserve.planner.offered_load import OfferedLoad
from pdserve.planner.virtual_cluster import Arrival


@dataclass(frozen=True)
class Traffic:
    """Requests by time. `cuts` divide it into parts, its ends included."""

    name: str
    rows: Sequence[TraceRow]
    cuts: tuple[float, ...]

    @property
    def duration_s(self) -> float:
        return self.cuts[-1]

    def arrivals(self) -> Iterator[Arrival]:
        """Yields the requests with their instants; prompts are made as they are due."""
        first_s = self.rows[0].offset_s
        load = OfferedLoad(
            Replayed([replace(row, offset_s=row.offset_s - first_s) for row in self.rows]), len(self.rows)
        )
        for arrival in load.arrivals(load.rate, 0):
            yield replace(arrival, at_s=arrival.at_s + first_s)

    def parts(self) -> list["Traffic"]:
        """Returns each part alone, from instant 0 on."""
        found = []
        for number, (start_s, end_s) in enumerate(pairwise(self.cuts)):
            rows = [
                replace(row, offset_s=row.offset_s - start_s)
                for row in self.rows
                if start_s <= row.offset_s < end_s
            ]
            found.append(Traffic(f"{self.name} {number}", rows, (0.0, end_s - start_s)))
        return found


def recorded(path: Path, speed: float, from_s: float, duration_s: float, max_tokens: int) -> list[TraceRow]:
    """Returns `duration_s` seconds of a trace from `from_s` on, both after it is made `speed` times as fast,
    without requests of more than `max_tokens` tokens."""
    rows = [
        replace(row, offset_s=row.offset_s / speed - from_s)
        for row in parse_trace(path.read_text().splitlines())
    ]
    return [
        row
        for row in rows
        if 0 <= row.offset_s < duration_s and row.num_prompt_tokens + row.num_output_tokens <= max_tokens
    ]


def in_turns(name: str, pieces: Sequence[tuple[Sequence[TraceRow], float]], part_s: float) -> Traffic:
    """Returns pieces, each with its duration, one after the other."""
    starts_s = list(accumulate((duration_s for _, duration_s in pieces), initial=0.0))
    rows = [
        replace(row, offset_s=start_s + row.offset_s)
        for (piece, _), start_s in zip(pieces, starts_s[:-1], strict=True)
        for row in piece
    ]
    num_parts = round(starts_s[-1] / part_s)
    return Traffic(name, rows, tuple(starts_s[-1] * number / num_parts for number in range(num_parts + 1)))


@dataclass(frozen=True)
class Kind:
    """Requests alike: lognormal lengths, with a coefficient of variation of 1."""

    mean_prompt_tokens: float
    mean_output_tokens: float
    max_prompt_tokens: int = 8000
    max_output_tokens: int = 1000

    def draw(self, rng: Random, at_s: float) -> TraceRow:
        sigma = sqrt(log(2.0))
        prompt, output = (
            round(rng.lognormvariate(log(mean) - sigma**2 / 2, sigma))
            for mean in (self.mean_prompt_tokens, self.mean_output_tokens)
        )
        return TraceRow(
            at_s,
            min(max(1, prompt), self.max_prompt_tokens),
            min(max(1, output), self.max_output_tokens),
        )


def day(seed: int, kinds: Sequence[Kind], peaks: Sequence[float], day_s: float, part_s: float) -> Traffic:
    """Returns one day: each kind has the same sinusoidal curve of its rate, from a tenth of its peak up, and
    the curves are shifted against each other."""
    rng = Random(seed)
    rows = []
    for number, (kind, peak) in enumerate(zip(kinds, peaks, strict=True)):
        at_s = 0.0
        while (at_s := at_s + rng.expovariate(peak)) < day_s:  # thinning: Lewis and Shedler, 1979
            phase = 2 * pi * (at_s / day_s - number / len(kinds))
            if rng.random() < 0.55 + 0.45 * sin(phase):
                rows.append(kind.draw(rng, at_s))
    rows.sort(key=lambda row: row.offset_s)
    num_parts = round(day_s / part_s)
    return Traffic(f"day {seed}", rows, tuple(day_s * number / num_parts for number in range(num_parts + 1)))


def steady(seed: int, kind: Kind, rate: float, duration_s: float) -> Traffic:
    """Returns Poisson arrivals of one kind."""
    rng = Random(seed)
    rows = []
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(rate)) < duration_s:
        rows.append(kind.draw(rng, at_s))
    return Traffic(f"steady {seed}", rows, (0.0, duration_s))
