import pytest

from pdserve.core.errors import ConfigError
from pdserve.loadgen.slo import Slo
from pdserve.planner.comparison import Margin, Question, compare, limits_of
from pdserve.planner.splits import Split, all_splits

from .replay_support import drawn, site

COLOCATED, SPLIT = Split(0, 2), Split(1, 1)


def question(slo: Slo, *, rate: float = 20.0, prompt: int = 1000, output: int = 20) -> Question:
    return Question(site(), drawn(rate, prompt, output, 40), slo, 0.9)


def test_every_division_of_the_devices_is_a_candidate() -> None:
    splits = list(all_splits(3))
    assert [str(split) for split in splits] == ["3 colocated", "1P2D", "1P2D auto", "2P1D", "2P1D auto"]
    assert all(split.num_prefill + split.num_decode == 3 for split in splits)


def test_a_split_says_what_it_is_in_the_configuration() -> None:
    assert Split(3, 5).settings == {
        "pools.prefill.instances": "3",
        "pools.decode.instances": "5",
        "routing.prefill_on_decode": "never",
    }
    assert "routing.prefill_on_decode" not in COLOCATED.settings


def test_tight_gaps_beside_long_prompts_are_best_disaggregated() -> None:
    """Each chunk of a prompt delays the tokens of whoever shares its step."""
    asked = question(Slo(ttft=2000.0, itl=12.0), prompt=2000, output=30)
    assert asked.goodput(SPLIT, 0) > asked.goodput(COLOCATED, 0)


def test_the_target_is_met_at_the_goodput_and_missed_above_it() -> None:
    asked = question(Slo(ttft=300.0))
    goodput = asked.goodput(SPLIT, 0)
    assert asked.attains(SPLIT, goodput, 0)
    assert not asked.attains(SPLIT, 1.05 * goodput, 0)
    assert asked.goodput(SPLIT, 0, near=1.3 * goodput) == pytest.approx(goodput, rel=0.05)


def test_a_trial_counts_the_misses_that_decide_whether_it_attains() -> None:
    asked = question(Slo(ttft=300.0))
    for rate in (10.0, 1000.0):
        trial = asked.site.try_out(SPLIT, asked.load, rate, asked.slo, 0)
        assert (trial.attainment >= 0.9) == asked.attains(SPLIT, rate, 0)
    assert trial.misses["ttft"] == trial.num_requests - trial.num_good
    assert limits_of(trial).startswith(f"{trial.misses['ttft'] / 40:.0%} miss TTFT: prompts queue")


def test_objectives_that_no_split_meets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"slo: ttft <= 0\.1 ms is met by no split at any rate"):
        compare(question(Slo(ttft=0.1)), [COLOCATED], 1)


def test_a_model_that_fits_no_device_is_refused() -> None:
    large = site(gpu="l4", num_layers=80)
    asked = Question(large, drawn(1.0, 100, 2, 10), Slo(ttft=1000.0), 0.9)
    with pytest.raises(ConfigError, match="memory"):
        compare(asked, all_splits(2), 1)


def test_prompts_with_hardly_any_output_are_best_colocated() -> None:
    """A decode instance would idle. The best split comes first, with its margin."""
    compared = compare(question(Slo(ttft=1000.0), prompt=2000, output=2), [SPLIT, COLOCATED], 1)
    assert [one.split for one in compared.ranked] == [COLOCATED, SPLIT]
    margin = compared.ranked[1].margin
    assert margin is not None and margin.low <= margin.ratio <= margin.high
    assert margin.is_certain and margin.ratio > 1.5
    assert "miss TTFT" in limits_of(compared.ranked[1].at_best)


def test_a_margins_interval_is_students() -> None:
    margin = Margin.of([1.1, 1.2, 1.3], [1.0, 1.0, 1.0])
    assert margin is not None
    assert margin.ratio == pytest.approx(1.1972, abs=1e-3)
    assert (margin.low, margin.high) == (pytest.approx(0.971, abs=5e-3), pytest.approx(1.475, abs=5e-3))
    assert not margin.is_certain
    assert Margin.of([1.0, 1.0], [0.0, 1.0]) is None
