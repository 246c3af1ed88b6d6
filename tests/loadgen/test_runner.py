"""Requests are sent when due, or when a client of a closed loop is free; the records of both."""

import asyncio
from collections.abc import Iterator
from itertools import count, islice

import pytest

from pdserve.loadgen.arrivals import Constant
from pdserve.loadgen.campaign import CampaignPlan, Contender, run_campaign, summed_up
from pdserve.loadgen.errors import LoadError
from pdserve.loadgen.lengths import Fixed
from pdserve.loadgen.runner import LoadRunner, RoundLoad
from pdserve.loadgen.slo import Slo
from pdserve.loadgen.target import LoadRequest
from pdserve.loadgen.workload import Drawn, ScheduledRequest
from tests.loadgen.support import ManualClock, ManualTarget

PLAN = CampaignPlan(Drawn(Constant(50.0), Fixed(8), Fixed(3)), max_requests=4)


def due(*instants_s: float) -> Iterator[ScheduledRequest]:
    return (ScheduledRequest(index, due_s, 4, 2) for index, due_s in enumerate(instants_s))


def endless() -> Iterator[ScheduledRequest]:
    return (ScheduledRequest(index, None, 4, 2) for index in count())


def make_request(job: ScheduledRequest) -> LoadRequest:
    return LoadRequest([job.index] * job.num_prompt_tokens, job.num_output_tokens)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def target(clock: ManualClock) -> ManualTarget:
    return ManualTarget(clock)


async def test_an_open_load_is_sent_when_due_regardless_of_answers(
    clock: ManualClock, target: ManualTarget
) -> None:
    instants = [0.0, 0.5, 0.5, 2.0, 7.25]
    target.on_send = lambda: target.answer_all() if len(target.requests) == len(instants) else None
    clock.at_s = 100.0
    records = await LoadRunner(target, clock).run(RoundLoad(due(*instants), make_request))
    assert target.max_open == len(instants)
    assert target.sent_s == [100.0 + instant for instant in instants]
    assert [record.lateness_s for record in records] == [0.0] * len(instants)
    assert [record.index for record in records] == [0, 1, 2, 3, 4]


async def test_a_late_generator_sends_at_once_and_records_its_lateness(
    clock: ManualClock, target: ManualTarget
) -> None:
    target.answer_all()

    def slow(job: ScheduledRequest) -> LoadRequest:
        clock.at_s += 1.0  # making a request takes longer than the gap
        return make_request(job)

    records = await LoadRunner(target, clock).run(RoundLoad(due(0.0, 0.5, 5.0), slow))
    assert [record.lateness_s for record in records] == [pytest.approx(1.0), pytest.approx(1.5), 0.0]


async def test_a_closed_load_has_so_many_requests_open_and_no_more(
    clock: ManualClock, target: ManualTarget
) -> None:
    target.at_once = True
    records = await LoadRunner(target, clock).run(
        RoundLoad(islice(endless(), 20), make_request, concurrency=3)
    )
    assert target.max_open == 3
    assert [request.token_ids[0] for request in target.requests] == list(range(20))
    assert all(record.lateness_s is None and record.answer is not None for record in records)


async def test_a_closed_load_sends_nothing_after_its_time(clock: ManualClock, target: ManualTarget) -> None:
    target.at_once = True

    def pass_time() -> None:
        clock.at_s += 1.0

    target.on_send = pass_time
    await LoadRunner(target, clock).run(RoundLoad(endless(), make_request, concurrency=1, duration_s=4.5))
    assert len(target.requests) == 5


async def test_a_failed_request_is_recorded_by_kind_without_stopping_the_load(
    clock: ManualClock, target: ManualTarget
) -> None:
    target.at_once, target.fails_with = True, "http 429"
    records = await LoadRunner(target, clock).run(RoundLoad(due(0.0, 1.0), make_request))
    assert [(record.error, record.message, record.answer) for record in records] == [
        ("http 429", "on purpose", None)
    ] * 2


async def test_a_request_that_takes_too_long_is_a_timeout(clock: ManualClock, target: ManualTarget) -> None:
    (record,) = await LoadRunner(target, clock).run(RoundLoad(due(0.0), make_request, timeout_s=0.0))
    assert (record.error, target.num_open) == ("timeout", 0)


async def test_a_load_that_is_cancelled_leaves_no_request_open(
    clock: ManualClock, target: ManualTarget
) -> None:
    sent = asyncio.Event()
    target.on_send = sent.set
    task = asyncio.create_task(LoadRunner(target, clock).run(RoundLoad(due(0.0), make_request)))
    await sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert target.num_open == 0


async def test_targets_alternate_with_equal_lengths_and_distinct_prompts(clock: ManualClock) -> None:
    order: list[str] = []
    targets = [ManualTarget(clock, at_once=True) for _ in range(2)]

    async def prepare(name: str) -> None:
        order.append(name)

    contenders = [
        Contender(name, target, lambda name=name: prepare(name))  # type: ignore[misc]
        for name, target in zip("ab", targets, strict=True)
    ]
    results = await run_campaign(
        CampaignPlan(PLAN.workload, num_rounds=3, max_requests=4, num_warm_up=2),
        contenders,
    )
    assert "".join(order) == "abbaab"
    assert [len(result.rounds) for result in results] == [3, 3]
    first, second = ([tuple(request.token_ids) for request in target.requests] for target in targets)
    assert [len(prompt) for prompt in first] == [len(prompt) for prompt in second]
    assert not set(first) & set(second)
    assert len(set(first)) == len(first) == 3 * (4 + 2)
    assert all(5 not in prompt for prompt in first)  # the target's special token


async def test_warm_up_requests_do_not_count(clock: ManualClock) -> None:
    target = ManualTarget(clock, at_once=True)
    (result,) = await run_campaign(
        CampaignPlan(PLAN.workload, max_requests=4, num_warm_up=9), [Contender("a", target)]
    )
    assert len(target.requests) == 13
    assert len(result.rounds[0].records) == 4
    summary = summed_up({}, [result], Slo())
    assert summary["targets"][0]["total"]["num_requests"] == 4
    assert summary["ratios"] == []


async def test_a_target_that_fails_warm_up_or_is_too_short_is_refused(
    clock: ManualClock,
) -> None:
    target = ManualTarget(clock, at_once=True)
    target.fails_with = "unavailable"
    with pytest.raises(LoadError, match="a: a warm-up request failed: unavailable: on purpose"):
        await run_campaign(
            CampaignPlan(PLAN.workload, max_requests=4, num_warm_up=1), [Contender("a", target)]
        )
    target.fails_with, target.at_once = None, False
    with pytest.raises(LoadError, match="a: a warm-up request failed: timeout"):
        await run_campaign(
            CampaignPlan(PLAN.workload, max_requests=4, num_warm_up=1, timeout_s=0.0),
            [Contender("a", target)],
        )
    long = Drawn(Constant(1.0), Fixed(990), Fixed(11))
    with pytest.raises(LoadError, match="1001 tokens together, but the model takes 1000"):
        await run_campaign(CampaignPlan(long, max_requests=1), [Contender("a", target)])
