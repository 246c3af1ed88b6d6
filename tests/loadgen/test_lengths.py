"""Token counts follow the distribution that was written down."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pdserve.loadgen.errors import LoadError
from pdserve.loadgen.lengths import Lengths, parse_lengths

NUM = 4000


def no_file(path: str) -> str:
    raise AssertionError(path)


def drawn(lengths: Lengths, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([lengths.draw(rng) for _ in range(NUM)])


@pytest.mark.parametrize("text", ["37", "fixed:37"])
def test_a_number_is_always_that(text: str) -> None:
    assert set(drawn(parse_lengths(text, no_file))) == {37}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 1000), st.integers(0, 12), st.integers(0, 2**32))
def test_uniform_reaches_both_ends_and_nothing_else(low: int, width: int, seed: int) -> None:
    lengths = parse_lengths(f"uniform:min={low},max={low + width}", no_file)
    assert set(drawn(lengths, seed)) == set(range(low, low + width + 1))


@settings(max_examples=20, deadline=None)
@given(st.floats(200, 5000), st.floats(0.1, 1.0), st.integers(0, 2**32))
def test_lognormal_has_the_mean_and_spread_that_were_asked_for(mean: float, cv: float, seed: int) -> None:
    values = drawn(parse_lengths(f"lognormal:mean={mean},cv={cv}", no_file), seed)
    assert values.mean() == pytest.approx(mean, rel=6 * cv / NUM**0.5 + 0.005)
    assert values.std() / values.mean() == pytest.approx(cv, rel=0.35)


def test_lognormal_is_clipped_to_its_bounds() -> None:
    values = drawn(parse_lengths("lognormal:mean=100,cv=2,min=50,max=200", no_file))
    assert (values.min(), values.max()) == (50, 200)


def test_lengths_of_a_file_are_drawn_with_equal_probability() -> None:
    lengths = parse_lengths("file:some/where.txt", {"some/where.txt": "3\n3\n9\n"}.__getitem__)
    values = drawn(lengths)
    assert set(values) == {3, 9}
    assert (values == 3).mean() == pytest.approx(2 / 3, abs=0.05)
    assert lengths.longest == 9


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "many",
        "uniform:min=5,max=4",
        "uniform:min=5",
        "uniform:min=1,max=2,mean=3",
        "lognormal:mean=0,cv=1",
        "lognormal:mean=5",
        "lognormal:mean=5,cv=1,min=9,max=8",
        "normal:mean=5",
        "file:",
        "file:empty",
        "file:words",
    ],
)
def test_an_invalid_length_is_refused_with_the_expected_form(text: str) -> None:
    with pytest.raises(LoadError, match="is not a length"):
        parse_lengths(text, {"empty": "", "words": "1 two"}.__getitem__)
