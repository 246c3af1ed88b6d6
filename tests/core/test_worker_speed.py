"""A worker's correction of the latency model: quick at first, steady later, bounded, and forgotten when idle."""

import random

import pytest
from hypothesis import given, strategies as st

from pdserve.core.latency import LatencyModel
from pdserve.core.messages import StepTiming
from pdserve.core.worker_speed import Correction, WorkerSpeed


def decode(num_sequences: int, seconds: float) -> StepTiming:
    return StepTiming(
        num_prefill_tokens=0,
        sum_prefill_squares=0,
        num_decode_sequences=num_sequences,
        num_context_tokens=100 * num_sequences,
        duration_s=seconds,
    )


def step_s(num_sequences: int) -> float:
    return 0.004 + 2e-4 * num_sequences


def train(model: LatencyModel, speeds: list[WorkerSpeed], slowness: list[float], num_steps: int) -> None:
    rng = random.Random(0)
    for _ in range(num_steps):
        for speed, factor in zip(speeds, slowness, strict=True):
            num = rng.randint(1, 31)
            model.observe_step(decode(num, factor * step_s(num) * rng.gauss(1.0, 0.03)), speed)


@pytest.mark.parametrize("slowness", [0.5, 3.0, 10.0])
def test_each_workers_steps_are_predicted_by_its_own_speed(slowness: float) -> None:
    model, ordinary, other = LatencyModel(), WorkerSpeed(), WorkerSpeed()
    train(model, [ordinary, other], [1.0, slowness], 200)
    for num in (1, 8, 30):
        predicted = model.decode_s(num, 100 * num)
        assert ordinary.decode_factor * predicted == pytest.approx(step_s(num), rel=0.15)
        assert other.decode_factor * predicted == pytest.approx(slowness * step_s(num), rel=0.15)


def test_a_worker_that_becomes_slow_changes_nothing_for_the_others() -> None:
    model, ordinary, other = LatencyModel(), WorkerSpeed(), WorkerSpeed()
    train(model, [ordinary, other], [1.0, 1.0], 100)
    train(model, [ordinary, other], [1.0, 10.0], 200)
    assert ordinary.decode_factor * model.decode_s(8, 800) == pytest.approx(step_s(8), rel=0.2)
    assert other.decode_factor * model.decode_s(8, 800) == pytest.approx(10.0 * step_s(8), rel=0.2)


@pytest.mark.parametrize("change", [0.04, 1.0, 25.0])
def test_a_worker_that_starts_is_taken_for_an_ordinary_one_whatever_all_others_have_become(
    change: float,
) -> None:
    model, speeds = LatencyModel(), [WorkerSpeed() for _ in range(3)]
    train(model, speeds, [1.0, 1.0, 8.0], 50)
    for _ in range(20):
        train(model, speeds, [change, change, 8.0 * change], 10)
        model.recentre([*speeds, WorkerSpeed()])
    for num in (1, 8, 30):
        predicted = WorkerSpeed().decode_factor * model.decode_s(num, 100 * num)
        assert predicted == pytest.approx(change * step_s(num), rel=0.2)
    assert speeds[2].decode_factor == pytest.approx(8.0, rel=0.2)


def test_centring_changes_no_prediction_for_a_worker_that_is_known() -> None:
    model, speeds, starting = LatencyModel(), [WorkerSpeed() for _ in range(4)], WorkerSpeed()
    train(model, speeds, [1.0] * 4, 50)
    train(model, speeds, [0.2, 0.3, 0.4, 2.0], 50)
    before = [speed.decode_factor * model.decode_s(8, 800) for speed in speeds]
    assert model.recentre([*speeds, starting])
    assert [speed.decode_factor * model.decode_s(8, 800) for speed in speeds] == pytest.approx(before)
    assert starting.decode_factor == 1.0 and not model.recentre(speeds)


def test_of_two_workers_the_faster_one_is_ordinary() -> None:
    model, speeds = LatencyModel(), [WorkerSpeed(), WorkerSpeed()]
    for _ in range(20):
        train(model, speeds, [1.0, 10.0], 10)
        model.recentre(speeds)
    assert model.decode_s(8, 800) == pytest.approx(step_s(8), rel=0.2)


def test_a_slow_worker_is_known_after_a_few_steps() -> None:
    correction = Correction()
    for _ in range(8):
        correction.observe(10.0 / correction.factor)
    assert correction.factor > 6.0


def test_one_slow_step_of_many_changes_little() -> None:
    correction = Correction()
    for _ in range(100):
        correction.observe(1.0)
    correction.observe(1000.0)
    assert correction.factor < 1.05


def test_an_idle_worker_is_tried_again_at_length() -> None:
    speed = WorkerSpeed()
    for _ in range(100):
        speed.decode.observe(8.0 / speed.decode_factor)
    for _ in range(120):
        speed.forget(0.5)
    assert 2.0 < speed.decode_factor < 6.0
    speed.forget(600.0)
    assert speed.decode_factor < 1.1


@pytest.mark.parametrize(("factor", "weight"), [(1.0, 1.0), (1.4, 1.0), (0.7, 1.0), (3.0, 2.0), (0.3, 0.45)])
def test_only_what_is_beyond_noise_tells_workers_apart(factor: float, weight: float) -> None:
    speed = WorkerSpeed()
    for _ in range(200):
        speed.decode.observe(factor / speed.decode_factor)
    assert speed.decode_factor == pytest.approx(factor, rel=0.1)
    assert speed.decode_weight == pytest.approx(weight, rel=0.1)


def test_one_kind_of_step_stands_for_the_other_until_that_is_measured() -> None:
    speed = WorkerSpeed()
    for _ in range(20):
        speed.decode.observe(4.0 / speed.decode_factor)
    assert speed.prefill_factor == speed.decode_factor > 3.0
    speed.prefill.observe(1.0)
    assert speed.prefill_factor == 1.0


@given(st.lists(st.floats(1e-12, 1e12)))
def test_whatever_is_measured_the_correction_stays_bounded(ratios: list[float]) -> None:
    correction = Correction()
    for ratio in ratios:
        correction.observe(ratio)
        assert 1 / 33 < correction.factor < 33
