from collections.abc import AsyncIterator, Mapping

import pytest
from msgspec import structs

from pdserve.core.config import ClusterConfig
from pdserve.core.errors import CapacityError
from pdserve.core.latency import LatencyModel
from pdserve.core.messages import Role
from pdserve.core.request import FinishReason
from pdserve.head.planning import Planning
from pdserve.router.core import Router
from pdserve.router.events import Timeline
from pdserve.router.planner_desk import Deed
from pdserve.router.planning import Advice, Ratio, Window
from tests.planner.live_support import terms

RANGE = {"instances": {"min": 1, "max": 3, "start": 2}}


class Fleet:
    """Any size has a place, or none."""

    def __init__(self) -> None:
        self.ratio = {Role.PREFILL: 2, Role.DECODE: 2}
        self.is_full = False

    def sizes(self) -> Mapping[Role, int]:
        return self.ratio

    def is_settled(self) -> bool:
        return True

    def start_s(self) -> float | None:
        return None

    def resize(self, sizes: Mapping[Role, int]) -> None:
        if self.is_full:
            raise CapacityError("no place")
        self.ratio = dict(sizes)


def config(mode: str) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {"pools": {"prefill": RANGE, "decode": RANGE}, "planner": {"mode": mode}}
    )


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
async def planning(fleet: Fleet) -> AsyncIterator[Planning]:
    model = LatencyModel()
    made = Planning(Router(model=model), model, fleet, 0)
    yield made
    await made.close()


def advice(number: int) -> Advice:
    return Advice(
        number=number, at_s=0.0, made_for=Ratio(2, 2), to=Ratio(3, 1), reason="better", window=Window()
    )


def ended(outcome: FinishReason, ttft_s: float = 0.5) -> Timeline:
    return Timeline(
        request_id="r",
        submitted_s=10.0,
        first_token_s=10.0 + ttft_s,
        ended_s=11.0 + ttft_s,
        dispatches=(),
        finish_reasons=(outcome,),
        num_prompt_tokens=7,
        num_output_tokens=(5,),
        client="c",
    )


async def test_advice_is_followed_in_auto_alone(planning: Planning, fleet: Fleet) -> None:
    planning.configure(config("advise"), terms)
    planning._advised(advice(planning.desk.number_summary()))
    assert fleet.ratio[Role.PREFILL] == 2
    planning.configure(config("auto"), terms)
    planning._advised(advice(planning.desk.number_summary()))
    assert fleet.ratio == {Role.PREFILL: 3, Role.DECODE: 1}


async def test_a_ratio_without_a_place_is_on_record_as_refused(planning: Planning, fleet: Fleet) -> None:
    fleet.is_full = True
    planning.configure(config("auto"), terms)
    planning._advised(advice(planning.desk.number_summary()))
    (record,) = planning.desk.records
    assert (record.deed, record.reason) == (Deed.REFUSED, "no place")


async def test_changes_by_an_operator_are_on_record_in_every_mode(planning: Planning, fleet: Fleet) -> None:
    planning.configure(config("off"), terms)
    fleet.resize({Role.PREFILL: 1, Role.DECODE: 3})
    planning.configure(config("off"), terms)
    planning.configure(config("auto"), terms)
    planning._advised(
        structs.replace(advice(planning.desk.number_summary()), made_for=Ratio(1, 3), to=Ratio(2, 2))
    )
    fleet.resize({Role.PREFILL: 3, Role.DECODE: 1})
    planning.configure(config("auto"), terms)
    assert [(one.made_for, one.to, one.deed) for one in planning.desk.records] == [
        (Ratio(2, 2), Ratio(1, 3), Deed.APPLIED),
        (Ratio(1, 3), Ratio(2, 2), Deed.CHANGED),
        (Ratio(2, 2), Ratio(3, 1), Deed.APPLIED),
    ]


async def test_requests_are_judged_by_both_objectives(planning: Planning) -> None:
    planning.configure(config("advise"), terms)
    for outcome, ttft_s in (
        (FinishReason.STOP, 0.5),
        (FinishReason.STOP, 9.0),
        (FinishReason.ERROR, 0.5),
        (FinishReason.CANCELLED, 0.5),
    ):
        planning.closed(ended(outcome, ttft_s))
    assert [one.is_good for one in planning._seen] == [True, False, False]
    assert (planning._seen[0].num_prompt_tokens, planning._seen[0].num_output_tokens) == (7, 5)


async def test_nothing_is_kept_while_it_is_off(planning: Planning) -> None:
    planning.closed(ended(FinishReason.STOP))
    planning.configure(config("advise"), terms)
    planning.configure(config("off"), terms)
    planning.closed(ended(FinishReason.STOP))
    assert not planning._seen and planning.terms is None
