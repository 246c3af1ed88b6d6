"""Gaps have the mean and the spread that their process promises."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pdserve.loadgen.arrivals import Arrivals, Constant, Gamma, Poisson, arrival_times, make_arrivals
from pdserve.loadgen.errors import LoadError

NUM = 20_000
rates = st.floats(0.01, 1000)


def gaps(arrivals: Arrivals, seed: int) -> np.ndarray:
    times = [0.0, *islice(arrival_times(arrivals, np.random.default_rng(seed)), NUM)]
    return np.array([later - earlier for earlier, later in pairwise(times)])


@settings(max_examples=30, deadline=None)
@given(rates, st.floats(0.1, 20), st.integers(0, 2**32))
def test_gamma_gaps_have_the_rate_and_the_burstiness(rate: float, burstiness: float, seed: int) -> None:
    seen = gaps(Gamma(rate, burstiness), seed) * rate
    cv = burstiness**-0.5
    assert seen.mean() == pytest.approx(1, abs=6 * cv / NUM**0.5)
    kurtosis = 3 + 6 / burstiness
    variance_error = cv**2 * ((kurtosis - 1) / NUM) ** 0.5
    assert seen.var() == pytest.approx(cv**2, abs=7 * variance_error)


@settings(max_examples=20, deadline=None)
@given(rates, st.integers(0, 2**32))
def test_poisson_gaps_are_exponential(rate: float, seed: int) -> None:
    seen = np.sort(gaps(Poisson(rate), seed)) * rate
    expected = 1 - np.exp(-seen)
    distance = np.abs(expected - np.arange(NUM) / NUM).max()
    assert distance < 2.5 / NUM**0.5  # Kolmogorov: exceeded once in 130,000 times


@given(rates)
@settings(max_examples=20, deadline=None)
def test_constant_gaps_are_all_the_same(rate: float) -> None:
    assert gaps(Constant(rate), 0) == pytest.approx(1 / rate, rel=1e-6)


@given(st.floats(0.1, 10), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_instants_ascend_and_the_same_seed_gives_the_same(burstiness: float, seed: int) -> None:
    first, second = (
        list(islice(arrival_times(Gamma(3.0, burstiness), np.random.default_rng(seed)), 1000))
        for _ in range(2)
    )
    assert first == second
    assert first == sorted(first)
    assert first[0] >= 0


@pytest.mark.parametrize(
    ("kind", "rate", "burstiness"),
    [("poisson", 0, 1), ("poisson", float("inf"), 1), ("gamma", 1, 0), ("often", 1, 1)],
)
def test_an_invalid_arrival_process_is_refused(kind: str, rate: float, burstiness: float) -> None:
    with pytest.raises(LoadError, match="is not valid"):
        make_arrivals(kind, rate, burstiness)
