from functools import cache

import pytest
from hypothesis import given, settings, strategies as st
from msgspec import structs

from pdserve.core.messages import Role
from pdserve.planner.calibration import Calibration
from pdserve.planner.changes import Change
from pdserve.planner.forecast import BINS_PER_HORIZON, FORECASTS
from pdserve.planner.seen_load import SeenLoad
from pdserve.router.planning import Bounds, InstanceFacts, Objective, Ratio

from .live_support import INTERVAL_S, OUTPUTS, PROMPTS, FollowedCluster, Load, terms

EVEN, MANY_PREFILL, MANY_DECODE = Ratio(2, 2), Ratio(3, 1), Ratio(1, 3)


WRONG = [(PROMPTS, MANY_DECODE), (OUTPUTS, MANY_PREFILL)]


@cache
def followed(load: Load, start: Ratio, num_summaries: int) -> FollowedCluster:
    """Replays that several tests make claims about, made once."""
    cluster = FollowedCluster(start)
    cluster.run(load, num_summaries)
    return cluster


@pytest.mark.parametrize(("load", "wrong"), WRONG)
def test_a_wrong_ratio_is_changed_once_under_a_stationary_load(load: Load, wrong: Ratio) -> None:
    cluster = followed(load, wrong, 15)
    (changed,) = cluster.changes
    assert changed != wrong
    assert cluster.advice[-1].candidates[0].ratio == cluster.ratio


def test_a_right_ratio_stays() -> None:
    assert not followed(PROMPTS, EVEN, 18).changes


def test_the_ratio_follows_a_load_that_turns_and_comes_back() -> None:
    cluster = FollowedCluster(MANY_PREFILL)
    assert not cluster.run(PROMPTS, 9)
    (to_decode,) = cluster.run(OUTPUTS, 6)
    assert to_decode.num_decode > 1
    cluster.ratio = MANY_DECODE
    (to_prefill,) = cluster.run(PROMPTS, 6)
    assert to_prefill.num_prefill > 1


@settings(max_examples=4, deadline=None)
@given(
    load=st.sampled_from((PROMPTS, OUTPUTS)),
    least=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    room=st.integers(2, 4),
    seed=st.integers(0, 1000),
)
def test_no_advice_leaves_the_bounds(load: Load, least: tuple[int, int], room: int, seed: int) -> None:
    bounds = Bounds(Ratio(*least), Ratio(3, 3), max(room, sum(least)))
    start = next(bounds.ratios())
    cluster = FollowedCluster(start, terms(bounds=bounds), seed)
    changes = cluster.run(load, 6)
    compared = [one.ratio for advice in cluster.advice for one in advice.candidates]
    assert all(bounds.allow(ratio) for ratio in changes + compared)


def test_every_change_brings_more_than_it_costs() -> None:
    for load, start in WRONG:
        for advice in followed(load, start, 15).advice:
            if advice.to is not None:
                (chosen,) = (one for one in advice.candidates if one.ratio == advice.to)
                assert chosen.gain > chosen.cost


def test_a_change_that_takes_longer_than_the_horizon_is_not_made() -> None:
    """Pools that differ cannot flip, and an instance takes long to start."""
    cluster = FollowedCluster(MANY_DECODE, structs.replace(terms(), can_flip=False))
    assert not cluster.run(PROMPTS, 9, start_s=100.0)
    assert cluster.advice[-1].candidates


def test_the_objective_cost_gives_idle_instances_back() -> None:
    idle = Load(2.5, 10, 2)
    assert not FollowedCluster(EVEN).run(idle, 12)
    changes = FollowedCluster(EVEN, terms(Objective.COST)).run(idle, 12)
    assert changes and changes[-1].num_instances < EVEN.num_instances


@pytest.mark.parametrize(
    ("load", "changes", "reason"),
    [
        (PROMPTS, {"is_settled": False}, "not all ready"),
        (PROMPTS, {"instances": ()}, "not all ready"),
        (PROMPTS, {"knows_latency": False}, "too few steps"),
        (Load(0.5, 100, 5), {}, "requests came lately, of at least 60"),
        (None, {}, "0 requests came lately"),
    ],
)
def test_what_is_not_known_is_no_reason_to_change(
    load: Load | None, changes: dict[str, object], reason: str
) -> None:
    cluster = FollowedCluster(MANY_DECODE)
    assert not cluster.run(load, 9, **changes)
    assert reason in cluster.advice[-1].reason and not cluster.advice[-1].candidates


def test_predictions_that_were_wrong_are_trusted_less() -> None:
    cluster = FollowedCluster(EVEN, honesty=0.3, every=6)
    cluster.run(PROMPTS, 18)
    right, wrong = followed(PROMPTS, EVEN, 18).advice[-1], cluster.advice[-1]
    assert right.trust > 0.85 > 0.7 > wrong.trust
    (check, *_) = wrong.checks
    assert check.came < 0.5 * check.predicted


def test_distrust_prevents_a_change() -> None:
    cluster = FollowedCluster(EVEN, honesty=0.0, every=6)
    cluster.run(PROMPTS, 24)
    cluster.ratio = MANY_DECODE
    assert not cluster.run(PROMPTS, 6)
    assert "the latest predictions were wrong" in cluster.advice[-1].reason


def test_a_prediction_is_not_checked_where_the_ratio_did_not_last() -> None:
    cluster, calibration = FollowedCluster(EVEN), Calibration()
    calibration.predict(0.0, 15.0, {EVEN: 0.9})
    calibration.observe(cluster.summary(PROMPTS))
    cluster.ratio = MANY_DECODE
    for _ in range(4):
        calibration.observe(cluster.summary(PROMPTS))
    assert not calibration.checks and calibration.trust == 1.0


@pytest.mark.parametrize(
    ("present", "wanted", "to_decode", "starts", "stops"),
    [
        (Ratio(1, 3), Ratio(2, 2), -1, (0, 0), (0, 0)),
        (Ratio(3, 1), Ratio(1, 3), 2, (0, 0), (0, 0)),
        (Ratio(1, 3), Ratio(3, 2), -1, (1, 0), (0, 0)),
        (Ratio(2, 2), Ratio(1, 2), 0, (0, 0), (1, 0)),
        (Ratio(2, 2), Ratio(2, 2), 0, (0, 0), (0, 0)),
    ],
)
def test_flips_come_before_starts(
    present: Ratio, wanted: Ratio, to_decode: int, starts: tuple[int, int], stops: tuple[int, int]
) -> None:
    change = Change.between(present, wanted, can_flip=True)
    assert change.num_to_decode == to_decode
    assert (tuple(change.starts.values()), tuple(change.stops.values())) == (starts, stops)
    alone = Change.between(present, wanted, can_flip=False)
    assert alone.num_to_decode == 0
    assert sum(alone.starts.values()) == abs(to_decode) + sum(starts)
    assert sum(alone.stops.values()) == abs(to_decode) + sum(stops)


def test_instances_that_start_serve_once_others_have_drained_and_they_have_loaded() -> None:
    cluster = FollowedCluster(MANY_PREFILL)
    unlike = structs.replace(cluster.terms, can_flip=False)
    summary = cluster.summary(None, terms=unlike)
    change = Change.between(MANY_PREFILL, EVEN, can_flip=False)
    assert change.delay_s(summary, 7.0) == 5.0 + 7.0
    roomy = structs.replace(unlike, bounds=Bounds(Ratio(1, 1), Ratio(3, 3), 5))
    assert change.delay_s(structs.replace(summary, terms=roomy), 7.0) == 5.0


@pytest.mark.parametrize("name", FORECASTS)
def test_a_constant_rate_is_forecast_to_stay(name: str) -> None:
    assert FORECASTS[name]([7.0] * 12) == pytest.approx(7.0)
    assert FORECASTS[name]([7.0]) == pytest.approx(7.0)


def test_forecasts_differ_on_a_rising_load_and_after_a_peak() -> None:
    rising = [float(rate) for rate in range(1, 25)]
    assert FORECASTS["smoothed trend"](rising) > FORECASTS["last window"](rising)
    peak = [1.0] * 12 + [9.0] * 3 + [1.0] * BINS_PER_HORIZON
    assert FORECASTS["recent peaks"](peak) == 9.0 and FORECASTS["last window"](peak) == 1.0


def test_arrivals_are_counted_in_whole_bins() -> None:
    cluster, load = FollowedCluster(EVEN), SeenLoad()
    for num_arrived in (0, 10, 20, 30):
        load.add(cluster.summary(None, num_arrived=num_arrived))
    assert terms().horizon_s / BINS_PER_HORIZON == INTERVAL_S
    assert load.rates() == pytest.approx([0.0, 2.0, 4.0, 6.0])


def test_a_slow_worker_counts_as_slow() -> None:
    """One of two prefill workers hardly serves: a third one is needed that two would not need."""
    cluster = FollowedCluster(EVEN)
    slow = tuple(
        InstanceFacts(role, 1000, factor, factor)
        for role, factor in (
            (Role.PREFILL, 20.0),
            (Role.PREFILL, 1.0),
            (Role.DECODE, 1.0),
            (Role.DECODE, 1.0),
        )
    )
    (changed,) = cluster.run(PROMPTS, 6, instances=slow)
    assert changed.num_prefill == 3


def test_the_same_summaries_lead_to_the_same_advice() -> None:
    again = FollowedCluster(MANY_DECODE)
    again.run(PROMPTS, 6)
    assert again.advice == followed(PROMPTS, MANY_DECODE, 15).advice[:2]
