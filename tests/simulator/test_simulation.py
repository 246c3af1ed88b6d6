"""Every promise holds in every seed, and a seed fully determines its run."""

import os
import re
import subprocess
import sys

import pytest

from pdserve.simulator.drawing import draw_scenario
from pdserve.simulator.run import simulate
from pdserve.simulator.simulation import Simulation

NUM_SEEDS = 200
FIGURE = re.compile(r"^(.+?)  +([0-9,]+)$", re.MULTILINE)
FAULTS = ("worker killed", "worker frozen", "message lost", "chunk corrupted", "router restarted")


def test_no_seed_breaks_a_promise() -> None:
    script = "from pdserve.cli.main import app; app()"
    run = subprocess.run(
        [sys.executable, "-c", script, "simulate", "--seeds", str(NUM_SEEDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = {name.strip(): int(number.replace(",", "")) for name, number in FIGURE.findall(run.stdout)}
    assert figures["seeds"] == NUM_SEEDS
    assert figures["resumed elsewhere"] > 100
    assert all(figures[kind] for kind in FAULTS)


@pytest.mark.parametrize("seed", [3, 42])
def test_a_seed_replays_exactly_even_in_another_process(seed: int) -> None:
    script = (
        f"from pdserve.simulator.run import simulate; print(*simulate({seed}, keep_timeline=True).timeline,"
        " sep='\\n')"
    )
    ours = simulate(seed, keep_timeline=True).timeline
    theirs = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert ours
    assert theirs.stdout.splitlines() == ours


def test_without_faults_nothing_is_ever_retried() -> None:
    for seed in range(25):
        simulation = Simulation(draw_scenario(seed, with_faults=False))
        assert not simulation.run().violations
        assert simulation.head.router.counters.retried == 0
