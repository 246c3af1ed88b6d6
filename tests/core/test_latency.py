"""The latency model follows what it measures, from priors that are far off, through noise, outliers and
changes."""

import random

import pytest
from hypothesis import given, strategies as st

from pdserve.core.latency import LatencyModel, LatencyPriors, RecursiveLeastSquares
from pdserve.core.messages import StepTiming, TransferStats


def prefill(num_tokens: int, context: int, seconds: float) -> StepTiming:
    return StepTiming(
        num_prefill_tokens=num_tokens,
        sum_prefill_squares=num_tokens * (context + num_tokens),
        num_decode_sequences=0,
        num_context_tokens=0,
        duration_s=seconds,
    )


def decode(num_sequences: int, context: int, seconds: float) -> StepTiming:
    return StepTiming(
        num_prefill_tokens=0,
        sum_prefill_squares=0,
        num_decode_sequences=num_sequences,
        num_context_tokens=context,
        duration_s=seconds,
    )


def true_prefill_s(num_tokens: int, context: int) -> float:
    return 0.005 + 7e-4 * num_tokens + 3e-8 * num_tokens * (context + num_tokens)


def trained(num_steps: int = 300, scale: float = 1.0, model: LatencyModel | None = None) -> LatencyModel:
    """A model after steps of random shapes on a machine of known speed, with 5 % noise."""
    rng = random.Random(1)
    model = model or LatencyModel()
    for _ in range(num_steps):
        num_tokens, context = rng.randint(1, 2000), rng.choice([0, 0, rng.randint(1, 8000)])
        model.observe_step(
            prefill(num_tokens, context, scale * true_prefill_s(num_tokens, context) * rng.gauss(1, 0.05))
        )
    return model


@pytest.mark.parametrize("shape", [(1, 0), (100, 0), (2000, 0), (500, 8000)])
def test_prefill_predictions_converge_from_priors_that_are_far_off(shape: tuple[int, int]) -> None:
    num_tokens, context = shape
    predicted = trained().prefill_s(num_tokens, num_tokens * (context + num_tokens))
    assert predicted == pytest.approx(true_prefill_s(num_tokens, context), rel=0.15)


def test_decode_is_fitted_in_two_ranges() -> None:
    rng = random.Random(2)
    model = LatencyModel()
    for _ in range(400):
        small, large = rng.randint(1, 31), rng.randint(32, 256)
        model.observe_step(decode(small, small * 300, 0.010 + 1e-3 * small))
        model.observe_step(decode(large, large * 300, 0.050 + 1e-4 * large))
    assert model.decode_s(8, 2400) == pytest.approx(0.018, rel=0.1)
    assert model.decode_s(128, 128 * 300) == pytest.approx(0.0628, rel=0.1)


def test_transfers_are_learnt_from_their_exposed_part() -> None:
    rng = random.Random(3)
    model = LatencyModel()
    for _ in range(200):
        exposed, hidden = rng.randint(0, 1 << 26), rng.randint(0, 1 << 26)
        stats = TransferStats(exposed + hidden, 8, 1.0, 0.003 + exposed / 2e9, hidden)
        model.observe_transfer(stats)
    assert model.transfer_s(1 << 26) == pytest.approx(0.003 + (1 << 26) / 2e9, rel=0.1)
    assert model.exposed_transfer_s(1 << 26, compute_s=10.0) == pytest.approx(0.003, rel=0.3)


def test_a_single_outlier_changes_nothing() -> None:
    model = trained()
    before = model.prefill_s(1000, 1_000_000)
    model.observe_step(prefill(1000, 0, 100 * before))
    assert model.prefill_s(1000, 1_000_000) == before


def test_a_lasting_slowdown_is_believed() -> None:
    model = trained(num_steps=100, scale=20.0, model=trained())
    assert model.prefill_s(1000, 1_000_000) == pytest.approx(20 * true_prefill_s(1000, 0), rel=0.2)


def test_a_lasting_speedup_is_followed() -> None:
    model = trained(num_steps=1000, scale=0.2, model=trained())
    assert model.prefill_s(1000, 1_000_000) == pytest.approx(0.2 * true_prefill_s(1000, 0), rel=0.2)


def test_thousands_of_equal_steps_preserve_predictions_for_other_shapes() -> None:
    model = trained()
    for _ in range(20_000):
        model.observe_step(prefill(512, 0, true_prefill_s(512, 0)))
    for num_tokens in (64, 512, 2000):
        predicted = model.prefill_s(num_tokens, num_tokens * num_tokens)
        assert predicted == pytest.approx(true_prefill_s(num_tokens, 0), rel=0.3)


def test_collinear_shapes_do_not_make_coefficients_drift() -> None:
    """Streams of one batch grow together and end one after the other; what a step costs hardly depends on its
    context."""
    rng = random.Random(5)
    model = LatencyModel(
        LatencyPriors(decode_step_s=2e-3, decode_context_token_s=1e-7, decode_sequence_s=1e-4)
    )
    for _ in range(40):
        lengths = [rng.choice((12, 200, 700, 1300)) for _ in range(rng.choice((1, 2, 5, 8)))]
        ends = [rng.randint(200, 700) for _ in lengths]
        for step in range(700):
            running = [length + step for length, end in zip(lengths, ends, strict=True) if step < end]
            if running:
                seconds = (3e-4 + 1e-4 * len(running)) * rng.choice((0.9, 1.0, 1.1, 1.1, 3.0))
                model.observe_step(decode(len(running), sum(running), seconds))
    for num_sequences in (1, 4, 8):
        assert model.decode_s(num_sequences, 1000 * num_sequences) < 3 * (3e-4 + 1e-4 * num_sequences)


def test_a_mixed_step_teaches_its_prefill_part() -> None:
    rng = random.Random(4)
    model = LatencyModel(LatencyPriors(decode_sequence_s=1e-3, decode_context_token_s=1e-9))
    for _ in range(300):
        num_tokens = rng.randint(1, 1000)
        timing = StepTiming(
            num_prefill_tokens=num_tokens,
            sum_prefill_squares=num_tokens * num_tokens,
            num_decode_sequences=10,
            num_context_tokens=1000,
            duration_s=true_prefill_s(num_tokens, 0) + 0.010,
        )
        model.observe_step(timing)
    assert model.prefill_s(500, 250_000) == pytest.approx(true_prefill_s(500, 0), rel=0.1)


def test_a_chunked_prompt_costs_the_sum_of_its_chunks() -> None:
    model = LatencyModel()
    chunks = [(512, 100), (512, 612), (200, 1124)]
    total = sum(model.prefill_s(new, new * (context + new)) for new, context in chunks)
    assert model.prompt_s(1224, 100, 512) == pytest.approx(total)


def test_priors_from_a_machines_peak_rates() -> None:
    priors = LatencyPriors.roofline(
        num_parameters=10**9,
        weight_bytes=2 * 10**9,
        kv_bytes_per_token=10**5,
        attention_flops_per_square=1e5,
        flops_per_s=1e14,
        memory_bytes_per_s=1e12,
        link_bytes_per_s=1e10,
    )
    model = LatencyModel(priors)
    assert model.decode_s(1, 0) == pytest.approx(0.003, rel=0.01)
    assert model.prefill_s(10_000, 0) == pytest.approx(0.201, rel=0.01)
    assert model.transfer_s(10**10) == pytest.approx(1.001, rel=0.01)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_prior_that_is_not_positive_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match="prefill_token_s"):
        LatencyPriors(prefill_token_s=value)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6), st.floats(0, 1e10), st.floats(1e-9, 1e4, allow_nan=False, allow_infinity=False)
        ),
        max_size=80,
    ),
    st.tuples(st.floats(0, 1e6), st.floats(0, 1e12)),
)
def test_whatever_is_measured_coefficients_stay_finite_and_never_negative(
    measured: list[tuple[float, float, float]], asked: tuple[float, float]
) -> None:
    fit = RecursiveLeastSquares((1e-3, 1e-5, 1e-10), 0.99)
    for tokens, squares, seconds in measured:
        fit.observe(1.0, tokens, squares, seconds)
    assert all(0.0 <= c < float("inf") for c in fit.coefficients)
