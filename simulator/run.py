"""Many seeds, on all cores, and one seed with its timeline."""

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from .drawing import draw_scenario
from .simulation import Simulation, SimulationOutcome


@dataclass
class SeedTally:
    """The tally of many seeds."""

    num_seeds: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    num_resumed: int = 0
    num_preemptions: int = 0
    num_events: int = 0
    virtual_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[SimulationOutcome] = field(default_factory=list)

    def add(self, outcome: SimulationOutcome) -> None:
        self.num_seeds += 1
        self.num_requests += outcome.num_requests
        self.num_tokens += outcome.num_tokens
        self.num_resumed += outcome.num_resumed
        self.num_preemptions += outcome.num_preemptions
        self.num_events += outcome.num_events
        self.virtual_s += outcome.virtual_s
        self.faults += outcome.faults
        if outcome.violations:
            self.failures.append(outcome)


def simulate(seed: int, *, pool_size: int | None = None, keep_timeline: bool = False) -> SimulationOutcome:
    """Simulates one seed, with pools of this size instead of drawn ones. Production's log messages about
    faults are hidden: the faults are intended."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        scenario = draw_scenario(seed, pool_size=pool_size)
        return Simulation(scenario, keep_timeline=keep_timeline).run()
    finally:
        logging.disable(level)


def simulate_all(
    seeds: Iterable[int], num_processes: int | None = None, pool_size: int | None = None
) -> Iterator[SimulationOutcome]:
    """Yields each seed's outcome, in order of completion, from `num_processes` processes (default: one per
    usable core)."""
    num_processes = num_processes or len(os.sched_getaffinity(0))
    one = partial(simulate, pool_size=pool_size)
    if num_processes == 1:
        yield from map(one, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        yield from pool.imap_unordered(one, seeds, chunksize=8)
