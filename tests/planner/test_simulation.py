"""Every promise holds in every seed, and a seed is the whole truth about its run."""

import os
import subprocess
import sys

import pytest

from pdserve.planner.run import Tally, simulate, simulate_all
from pdserve.planner.scenario import draw_scenario
from pdserve.planner.simulation import Simulation

NUM_SEEDS = 2000
FAULTS = ("worker killed", "worker frozen", "message lost", "chunk corrupted", "router restarted")


def test_no_seed_breaks_a_promise() -> None:
    tally = Tally()
    for outcome in simulate_all(range(NUM_SEEDS)):
        tally.add(outcome)
    assert not tally.failures, [(outcome.seed, outcome.violations[0]) for outcome in tally.failures]
    assert tally.num_seeds == NUM_SEEDS
    assert tally.num_resumed > 100
    assert all(tally.faults[kind] for kind in FAULTS)


@pytest.mark.parametrize("seed", [3, 42])
def test_a_seed_replays_exactly_also_in_another_process(seed: int) -> None:
    script = f"from pdserve.planner.run import simulate; print(*simulate({seed}, keep_timeline=True).timeline, sep='\\n')"
    ours = simulate(seed, keep_timeline=True).timeline
    theirs = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert ours
    assert theirs.stdout.splitlines() == ours


def test_without_faults_nothing_is_ever_retried() -> None:
    for seed in range(50):
        simulation = Simulation(draw_scenario(seed, with_faults=False))
        assert not simulation.run().violations
        assert simulation.head.router.counters.retried == 0
