"""`pdserve simulate`: the cluster in virtual time, one seed with its timeline or many with their sum."""

import sys
import time

from ..simulator.run import SeedTally, simulate, simulate_all

MAX_SHOWN_FAILURES = 20


def show_seed(seed: int, pool_size: int | None) -> int:
    """Print the seed's timeline; returns how many promises were broken."""
    outcome = simulate(seed, pool_size=pool_size, keep_timeline=True)
    for line in outcome.timeline:
        print(line)
    print(
        f"seed {seed}: {outcome.num_requests} requests, {outcome.num_tokens} tokens, {outcome.num_resumed}"
        f" requests resumed, {outcome.num_events} events in {outcome.virtual_s:.1f} virtual seconds,"
        f" {len(outcome.violations)} violations"
    )
    return len(outcome.violations)


def show_range(first_seed: int, num_seeds: int, num_processes: int | None, pool_size: int | None) -> int:
    """Run a range of seeds and print what they amount to; returns how many broke a promise."""
    tally, started_s = SeedTally(), time.perf_counter()
    shown_s = started_s
    seeds = range(first_seed, first_seed + num_seeds)
    for outcome in simulate_all(seeds, num_processes, pool_size):
        tally.add(outcome)
        if outcome.violations and len(tally.failures) <= MAX_SHOWN_FAILURES:
            print(f"seed {outcome.seed}: {outcome.violations[0]}", flush=True)
        if sys.stderr.isatty() and time.perf_counter() - shown_s > 0.5:
            shown_s = time.perf_counter()
            print(f"\r{tally.num_seeds} of {num_seeds} seeds", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(_summary(tally, time.perf_counter() - started_s))
    if tally.failures:
        pools = "" if pool_size is None else f" --pools {pool_size}"
        print(f"`pdserve simulate --seed {tally.failures[0].seed}{pools}` shows the first of them")
    return len(tally.failures)


def _summary(tally: SeedTally, seconds: float) -> str:
    rows = [
        ("seeds", tally.num_seeds),
        ("requests", tally.num_requests),
        ("  resumed elsewhere", tally.num_resumed),
        ("tokens, each compared", tally.num_tokens),
        ("sequences preempted", tally.num_preemptions),
        ("events", tally.num_events),
        ("virtual hours", round(tally.virtual_s / 3600, 1)),
        *((f"  {kind}", number) for kind, number in sorted(tally.faults.items())),
        ("seeds that broke a promise", len(tally.failures)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {number:>14,}" for name, number in rows]
    return "\n".join([*lines, f"{'seconds':{width}}  {seconds:>14,.1f}"])
