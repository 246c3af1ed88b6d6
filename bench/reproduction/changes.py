"""The gain of each change that the live planner made, over many seeds, as traffic turns and as it stays.

    python -m bench.reproduction.changes [--seeds 200] [--steady]

Each change is judged by itself: the same traffic is served up to a horizon behind it, with the changes up to
it and with those before it. What it brought is the difference in good requests, of all that came until
then."""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from random import Random

from pdserve.planner.changes import FLIP_S
from pdserve.router.planning import Ratio

from .changing_cluster import ChangingCluster
from .policies import Auto, Scripted
from .profiles import SLOW
from .traffic import Kind, Traffic, in_turns, steady

START = Ratio(4, 4)
HORIZON_S = 30.0
PHASE_S = 60.0
PROMPTS, OUTPUTS = Kind(150, 4, 2000, 100), Kind(30, 40, 2000, 400)
RATES = {PROMPTS: (6.0, 11.0), OUTPUTS: (8.0, 14.0)}  # some of them more than any ratio serves


@dataclass(frozen=True)
class Change:
    """A change, and the good requests that it brought."""

    seed: int
    at_s: float
    left: Ratio
    to: Ratio
    brought: int
    num_requests: int


def turning(seed: int) -> Traffic:
    """Returns prompts and outputs in turns, each at a rate of its own."""
    rng = Random(seed)
    kinds = [PROMPTS, OUTPUTS, PROMPTS] if rng.random() < 0.5 else [OUTPUTS, PROMPTS, OUTPUTS]
    pieces = [
        (steady(3 * seed + number, kind, rng.uniform(*RATES[kind]), PHASE_S).rows, PHASE_S)
        for number, kind in enumerate(kinds)
    ]
    return in_turns(f"turning {seed}", pieces, PHASE_S)


def staying(seed: int) -> Traffic:
    rng = Random(seed)
    kind = rng.choice([PROMPTS, OUTPUTS])
    return steady(seed, kind, rng.uniform(*RATES[kind]), 3 * PHASE_S)


def changes_of(traffic: Traffic) -> Sequence[tuple[float, Ratio]]:
    return ChangingCluster(SLOW, START, HORIZON_S).serve(traffic, Auto()).changes


def num_good(traffic: Traffic, changes: Sequence[tuple[float, Ratio]], until_s: float) -> int:
    rows = [row for row in traffic.rows if row.offset_s < until_s]
    script = Scripted([(at_s - FLIP_S, ratio) for at_s, ratio in changes])
    cut = replace(traffic, rows=rows, cuts=(0.0, until_s))
    return sum(ChangingCluster(SLOW, START, HORIZON_S).serve(cut, script).are_good)


def judged(seed: int) -> list[Change]:
    traffic = turning(seed)
    changes = changes_of(traffic)
    found = []
    for number, (at_s, to) in enumerate(changes):
        until_s = min(at_s + HORIZON_S, traffic.duration_s)
        with_it, without = (num_good(traffic, changes[:count], until_s) for count in (number + 1, number))
        num_requests = sum(at_s <= row.offset_s < until_s for row in traffic.rows)
        left = changes[number - 1][1] if number else START
        found.append(Change(seed, at_s, left, to, with_it - without, num_requests))
    return found


def stayed(seed: int) -> int:
    return len(changes_of(staying(seed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steady", action="store_true", help="traffic that stays: changes behind the first")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        if options.steady:
            counts = list(pool.map(stayed, seeds))
            again = [f"{seed} ({count})" for seed, count in zip(seeds, counts, strict=True) if count > 1]
            print(
                f"{len(counts)} seeds, {sum(map(bool, counts))} with a change, {len(again)} with another one"
            )
            print("\n".join(again))
            return
        changes = [change for found in pool.map(judged, seeds) for change in found]
    bad = [change for change in changes if change.brought < 0]
    share = sum(change.brought for change in changes) / max(1, sum(change.num_requests for change in changes))
    print(
        f"{len(seeds)} seeds, {len(changes)} changes, which brought {share:.1%} of the requests behind them"
    )
    print(f"{len(bad)} cost more than they brought: {len(bad) / max(1, len(changes)):.1%}")
    for change in bad:
        print(
            f"seed {change.seed}, {change.at_s:.0f} s: {change.left} -> {change.to}:"
            f" {change.brought} of {change.num_requests}"
        )


if __name__ == "__main__":
    main()
