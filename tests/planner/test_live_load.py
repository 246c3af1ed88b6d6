"""When the live planner decides again, and which requests it decides by."""

import pytest
from msgspec import structs

from pdserve.planner.live import LivePlanner
from pdserve.planner.seen_load import SeenLoad
from pdserve.router.planning import Bounds, Objective, Ratio, SeenRequest

from .live_support import INTERVAL_S, OUTPUTS, PROMPTS, FollowedCluster, Load, terms

EVEN = Ratio(2, 2)


def fed(planner: LivePlanner, cluster: FollowedCluster, load: Load, num_summaries: int) -> None:
    for _ in range(num_summaries):
        planner.observe(cluster.summary(load))


def test_requests_that_took_longer_than_a_horizon_are_seen() -> None:
    """Under overload there are no others."""
    cluster, load = FollowedCluster(EVEN), SeenLoad()
    late = tuple(SeenRequest(-500.0 + i, 100, 0, 5, "c", False) for i in range(70))
    load.add(structs.replace(cluster.summary(None), seen=late))
    assert load.latest(40_000) == list(late)
    for _ in range(round(terms().horizon_s / INTERVAL_S)):
        load.add(cluster.summary(None))
    assert not load.latest(40_000)


def test_a_load_that_stays_needs_no_decision_for_two_horizons() -> None:
    cluster, planner = FollowedCluster(EVEN), LivePlanner()
    steady = Load(8.0, 10, 2)
    fed(planner, cluster, steady, 8)
    assert planner.is_due
    assert planner.decide().candidates
    fed(planner, cluster, steady, 11)
    assert not planner.is_due
    fed(planner, cluster, steady, 1)
    assert planner.is_due


@pytest.mark.parametrize("other", [OUTPUTS, PROMPTS])
def test_another_load_needs_a_decision_at_once(other: Load) -> None:
    cluster, planner = FollowedCluster(EVEN), LivePlanner()
    fed(planner, cluster, OUTPUTS if other is PROMPTS else PROMPTS, 8)
    planner.decide()
    fed(planner, cluster, other, 2)
    assert planner.is_due


def test_where_all_requests_are_good_no_other_ratio_is_replayed() -> None:
    cluster = FollowedCluster(EVEN)
    cluster.run(Load(5.0, 3, 2), 9)
    (present,) = cluster.advice[-1].candidates
    assert present.ratio == EVEN and "no change could pay" in cluster.advice[-1].reason


def test_fewer_instances_are_considered_for_their_cost_alone() -> None:
    bounds = Bounds(Ratio(1, 1), Ratio(3, 3), 4)
    considered = {}
    for objective in Objective:
        cluster = FollowedCluster(EVEN, terms(objective, bounds))
        cluster.run(Load(6.0, 150, 3), 3)
        considered[objective] = {one.ratio.num_instances for one in cluster.advice[-1].candidates}
    assert considered[Objective.GOODPUT] == {4}
    assert min(considered[Objective.COST]) < 4
