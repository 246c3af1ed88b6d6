"""Draws instances of several ranks into some scenarios, with accidents of single ranks."""

from dataclasses import replace
from random import Random

from .faults import OF_THE_ROUTER, ORDERLY
from .rank_accidents import PlannedRankAccident, RankAccident
from .scenario import CALM_S, Scenario

RATE = 0.15  # of the seeds


def with_ranks(rng: Random, scenario: Scenario) -> Scenario:
    """Gives each pool's instances a number of ranks, often different ones. Ranks have accidents where workers
    have them too."""
    if rng.random() >= RATE:
        return scenario
    num_kv_heads = rng.choice((1, 2, 4))
    most = rng.choice((2, 4))
    shapes = {
        role: replace(shape, num_ranks=num_ranks, num_kv_heads=num_kv_heads)
        for (role, shape), num_ranks in zip(
            scenario.shapes.items(),
            rng.choice(((1, most), (most, 1), (most, most), (2, 4), (4, 2))),
            strict=True,
        )
    }
    kinds = {accident.kind for accident in scenario.accidents} - {*ORDERLY, *OF_THE_ROUTER}
    num_accidents = rng.randint(0, 4) if kinds and scenario.rates.accidents_per_s else 0
    return replace(
        scenario,
        shapes=shapes,
        rank_accidents=tuple(
            PlannedRankAccident(
                rng.uniform(0.3, CALM_S),
                rng.choice(list(RankAccident)),
                (rng.random(), rng.random()),
                rng.choice((0.05, 0.5, 2.0, 5.0)),
            )
            for _ in range(num_accidents)
        ),
    )
