"""Published figures, as the replay has them."""

import pytest

from bench.reproduction.bending import beyond_capacity, bursts, serve
from bench.reproduction.distserve import DECODE_ALONE, PREFILL_ALONE
from bench.reproduction.sustained import Trial


@pytest.mark.parametrize(("trial", "paper"), [(PREFILL_ALONE, 5.6), (DECODE_ALONE, 10.0)])
def test_a_phase_alone_sustains_distserves_rate_within_five_percent(trial: Trial, paper: float) -> None:
    assert trial.attains(0.95 * paper)
    assert not trial.attains(1.05 * paper)


@pytest.mark.parametrize("lengths", [(512, 32), (1500, 16), (64, 100)])
def test_beyond_capacity_disaggregated_throughput_is_near_colocated(lengths: tuple[int, int]) -> None:
    colocated, strict, bending = (one.tokens_per_s for one in beyond_capacity(lengths, 1.5, 8.0))
    assert bending > 0.9 * colocated
    assert bending > strict


def test_bursts_of_prompts_wait_less_where_decode_instances_take_some() -> None:
    arrivals = bursts(16.0, 1, 20.0)
    strict, bending = (serve((2, 2), bends, 0.1, arrivals) for bends in (False, True))
    assert bending.ttft_s(95) < 0.7 * strict.ttft_s(95)
