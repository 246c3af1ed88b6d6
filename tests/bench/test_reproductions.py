"""Published figures, as the replay has them."""

import pytest

from bench.reproduction.distserve import DECODE_ALONE, NUM_GPUS, PREFILL_ALONE
from bench.reproduction.sustained import Trial


@pytest.mark.parametrize(("trial", "paper"), [(PREFILL_ALONE, 5.6), (DECODE_ALONE, 10.0)])
def test_a_phase_alone_sustains_distserves_rate_within_five_percent(trial: Trial, paper: float) -> None:
    assert trial.attains(0.95 * NUM_GPUS * paper)
    assert not trial.attains(1.05 * NUM_GPUS * paper)
