"""When the live planner decides again, and which requests it decides by."""

from random import Random

import pytest

from pdserve.planner.demand import demand
from pdserve.planner.live import LivePlanner, lower_end
from pdserve.planner.replay import outlook, replay
from pdserve.planner.seen_load import MIN_RECENT, OutputLengths, SeenLoad
from pdserve.router.planning import Bounds, Objective, OpenRequest, Ratio

from .live_support import OUTPUTS, PROMPTS, FollowedCluster, Load, terms

EVEN, MANY_PREFILL, MANY_DECODE = Ratio(2, 2), Ratio(3, 1), Ratio(1, 3)


def fed(planner: LivePlanner, cluster: FollowedCluster, load: Load, num_summaries: int) -> None:
    for _ in range(num_summaries):
        planner.observe(cluster.summary(load))


def waiting(at_s: float, num_prompt_tokens: int = 100) -> OpenRequest:
    return OpenRequest(at_s, num_prompt_tokens, 0, 0, "c", None)


def decoding(at_s: float, num_tokens: int, first_token_s: float) -> OpenRequest:
    return OpenRequest(at_s, 10, 0, num_tokens, "c", first_token_s)


def test_the_latest_arrivals_count_and_no_older_ones() -> None:
    cluster, load = FollowedCluster(EVEN), SeenLoad()
    for _ in range(4):
        load.add(cluster.summary(Load(20.0, 10, 2)))
    load.add(cluster.summary(None, open=(waiting(24.0),)))
    recent = load.recent(Random(0))
    assert all(one.at_s > 15.0 for one in recent.requests) and len(recent.requests) >= MIN_RECENT
    assert recent.requests[-1].at_s == 24.0 and recent.rate == pytest.approx(
        len(recent.requests) / 10, rel=0.1
    )


def test_arrivals_that_are_rare_are_taken_from_longer_ago() -> None:
    cluster, load = FollowedCluster(EVEN), SeenLoad()
    for _ in range(12):
        load.add(cluster.summary(Load(2.0, 10, 2)))
    recent = load.recent(Random(0))
    assert len(recent.requests) == MIN_RECENT and 20.0 < recent.span_s < 45.0


def test_outputs_that_have_not_ended_count_as_longer() -> None:
    """Half of the outputs have 200 tokens, of which those of 10 have ended."""
    lengths = OutputLengths([10] * 50, [100] * 50)
    rng = Random(1)
    drawn = [lengths.draw(rng, 0) for _ in range(1000)]
    assert 0.45 < sum(length > 100 for length in drawn) / 1000 < 0.55
    assert set(drawn) - {10} and min(length for length in drawn if length != 10) > 100


def test_an_output_is_longer_than_it_is_already() -> None:
    lengths = OutputLengths([5, 10, 20], [])
    assert {lengths.draw(Random(seed), 10) for seed in range(50)} == {20}
    assert lengths.draw(Random(0), 300) > 300


def test_prompts_ask_for_prefill_and_outputs_for_decode() -> None:
    cluster = FollowedCluster(EVEN)
    for load, better, worse in ((PROMPTS, MANY_PREFILL, MANY_DECODE), (OUTPUTS, MANY_DECODE, MANY_PREFILL)):
        summary = cluster.summary(load)
        found = demand(summary, summary.seen, load.rate, ())
        assert found.utilisation(better) < found.utilisation(worse)
        backlog = demand(summary, summary.seen, load.rate, summary.seen)
        assert backlog.utilisation(EVEN) > found.utilisation(EVEN)
        assert backlog.mix == pytest.approx(found.mix)


def test_a_replay_begins_with_what_waits_and_what_is_decoded() -> None:
    """Prompts that waited for longer than the objective are bad, and delay those that come."""
    cluster, load = FollowedCluster(EVEN), SeenLoad()
    load.add(cluster.summary(Load(2.0, 100, 2)))
    late = tuple(waiting(-10.0 + number / 100) for number in range(60))
    streams = tuple(decoding(3.0, 4, 4.0 + number / 100) for number in range(20))
    outcomes = {}
    for name, there in (("empty", ()), ("full", late + streams)):
        load.add(cluster.summary(Load(2.0, 100, 2), open=there))
        summary = cluster.summary(Load(2.0, 100, 2), open=there)
        load.add(summary)
        what = outlook(summary, load.recent(Random(0)), 2.0, Random(0))
        assert (len(what.decoding), sum(one.at_s < 0 for one in what.arrivals)) == (
            (20, 60) if there else (0, 0)
        )
        served = replay(summary, EVEN, what)
        outcomes[name] = served.are_good[80 if there else 0 :]
        assert not any(served.are_good[20:80]) if there else True
    assert sum(outcomes["full"]) < sum(outcomes["empty"])


def test_a_queue_that_is_left_counts_where_all_requests_are_bad() -> None:
    """No ratio serves anybody in time, but one of them works the queue off sooner."""
    cluster, load = FollowedCluster(MANY_DECODE), SeenLoad()
    load.add(cluster.summary(PROMPTS))
    summary = cluster.summary(PROMPTS, open=tuple(waiting(-30.0 + n / 100) for n in range(100)))
    load.add(summary)
    what = outlook(summary, load.recent(Random(0)), PROMPTS.rate, Random(0))
    present, other = replay(summary, MANY_DECODE, what), replay(summary, EVEN, what)
    assert not any(present.are_good + other.are_good)
    assert 0 < other.late_s < present.late_s


def test_a_replay_is_given_up_once_too_many_are_bad() -> None:
    cluster, load = FollowedCluster(EVEN), SeenLoad()
    load.add(cluster.summary(PROMPTS))
    summary = cluster.summary(PROMPTS, open=tuple(waiting(-50.0) for _ in range(10)))
    load.add(summary)
    what = outlook(summary, load.recent(Random(0)), 1.0, Random(0))
    assert replay(summary, EVEN, what).is_whole
    assert not replay(summary, EVEN, what, max_bad=5).is_whole


def test_a_gain_that_lasts_is_certain_and_one_that_comes_and_goes_is_not() -> None:
    growing = [0.0] * 60 + [1.0] * 60
    assert lower_end(growing) > 30
    assert lower_end([1.0, -1.0] * 60) <= 0
    by_turns = ([1.0] * 10 + [-0.8] * 10) * 6
    assert sum(by_turns) > 0 > lower_end(by_turns)


def test_a_load_that_stays_needs_no_decision_for_long() -> None:
    cluster, planner = FollowedCluster(EVEN), LivePlanner()
    steady = Load(8.0, 10, 2)
    fed(planner, cluster, steady, 8)
    assert planner.is_due
    assert planner.decide().candidates
    fed(planner, cluster, steady, 23)
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
    assert present.ratio == EVEN and "no other ratio brings more" in cluster.advice[-1].reason


def test_fewer_instances_are_considered_for_their_cost_alone() -> None:
    bounds = Bounds(Ratio(1, 1), Ratio(3, 3), 4)
    considered = {}
    for objective in Objective:
        cluster = FollowedCluster(EVEN, terms(objective, bounds))
        cluster.run(Load(6.0, 150, 3), 3)
        considered[objective] = {one.ratio.num_instances for one in cluster.advice[-1].candidates}
    assert considered[Objective.GOODPUT] == {4}
    assert min(considered[Objective.COST]) < 4
