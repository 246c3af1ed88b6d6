"""The cluster that policies change, and published rules as policies."""

from dataclasses import replace

import pytest

from bench.reproduction.changing_cluster import ChangingCluster, Gauges, Policy, terms_of
from bench.reproduction.policies import Auto, Dynamo, Fixed, Reactive, Scripted, TokenScale
from bench.reproduction.profiles import AZURE
from bench.reproduction.traffic import Kind, day, in_turns, steady
from pdserve.core.latency import LatencyModel
from pdserve.planner.changes import FLIP_S
from pdserve.router.config import RouterConfig
from pdserve.router.planning import Ratio, SeenRequest, Summary

EVEN = Ratio(4, 4)
PROMPTS, OUTPUTS = Kind(3000, 4), Kind(100, 400)


def summary(kind: Kind, rate: float, duration_s: float) -> Summary:
    num_requests = round(rate * duration_s)
    return Summary(
        number=1,
        at_s=duration_s,
        duration_s=duration_s,
        num_arrived=num_requests,
        seen=(SeenRequest(0.0, int(kind.mean_prompt_tokens), 0, int(kind.mean_output_tokens), "", True),)
        * num_requests,
        open=(),
        ratio=EVEN,
        is_settled=True,
        instances=(),
        latency=LatencyModel(AZURE.profile.durations.priors).learnt,
        knows_latency=True,
        start_s=30.0,
        terms=terms_of(AZURE, 60.0, RouterConfig()),
    )


def test_every_request_is_served_while_workers_flip() -> None:
    traffic = steady(1, Kind(300, 20), 8.0, 20.0)
    script = Scripted([(4.0, Ratio(6, 2)), (10.0, Ratio(2, 6))])
    cluster = ChangingCluster(AZURE, EVEN, 10.0)
    outcome = cluster.serve(traffic, script)
    assert [one.is_complete for one in outcome.served] == [True] * len(traffic.rows)
    assert outcome.changes == [(4.0 + FLIP_S, Ratio(6, 2)), (10.0 + FLIP_S, Ratio(2, 6))]


def test_parts_of_traffic_have_all_of_its_requests() -> None:
    traffic = day(3, (PROMPTS, OUTPUTS), (2.0, 3.0), 60.0, 20.0)
    parts = traffic.parts()
    assert sum(len(part.rows) for part in parts) == len(traffic.rows)
    assert all(0 <= row.offset_s < 20.0 for part in parts for row in part.rows)
    both = in_turns("both", [(part.rows, 20.0) for part in parts], 20.0)
    assert [row.num_prompt_tokens for row in both.rows] == [row.num_prompt_tokens for row in traffic.rows]


@pytest.mark.parametrize("rule", [Dynamo(AZURE, 60.0), TokenScale(AZURE, 60.0)])
@pytest.mark.parametrize(
    ("kind", "rate", "has_more_prefill"), [(PROMPTS, 10.0, True), (OUTPUTS, 10.0, False)]
)
def test_published_rules_follow_the_lengths_of_requests(
    rule: Policy, kind: Kind, rate: float, has_more_prefill: bool
) -> None:
    ratio = replace(rule).decide(summary(kind, rate, 60.0), Gauges(0.0, 0.0))  # type: ignore[type-var]
    assert ratio is not None and ratio.num_instances == 8
    assert (ratio.num_prefill > ratio.num_decode) == has_more_prefill


def test_thresholds_move_one_instance_to_the_pool_that_is_full() -> None:
    now = summary(PROMPTS, 1.0, 60.0)
    assert Reactive().decide(now, Gauges(9.0, 0.3)) == Ratio(5, 3)
    assert Reactive().decide(now, Gauges(0.0, 0.95)) == Ratio(3, 5)
    assert Reactive().decide(now, Gauges(1.0, 0.6)) is None


def test_the_planner_ends_a_shortage_that_a_fixed_ratio_keeps() -> None:
    traffic = steady(2, Kind(2500, 3), 5.0, 60.0)
    start = Ratio(1, 7)
    fixed = ChangingCluster(AZURE, start, 30.0, prefill_on_decode=False).serve(traffic, Fixed())
    auto = ChangingCluster(AZURE, start, 30.0, prefill_on_decode=False).serve(traffic, Auto())
    assert auto.changes and auto.attainment > fixed.attainment + 0.2
