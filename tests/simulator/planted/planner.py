"""Planted bugs in which of the planner's advice is followed."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from pdserve.router.planner_desk import Deed, Mode, PlannerDesk
from pdserve.router.planning import Advice, Bounds, Ratio

from . import Mutation, Planted


def follow_advice_for_a_ratio_that_has_changed() -> Planted:
    original = PlannerDesk._judge

    def judge(self: PlannerDesk, advice: Advice, to: Ratio) -> Deed:
        self._valid_from, self._ratio = 0, advice.made_for
        return original(self, advice, to)

    return patch.object(PlannerDesk, "_judge", judge)


@contextmanager
def follow_advice_for_a_ratio_that_has_come_back() -> Iterator[None]:
    """Removes both checks: which advice has been overtaken, and what has changed since its summary."""
    configure, receive = PlannerDesk.configure, PlannerDesk.receive

    def on_configure(self: PlannerDesk, mode: Mode, bounds: Bounds, ratio: Ratio) -> None:
        valid_from = self._valid_from
        configure(self, mode, bounds, ratio)
        self._valid_from = valid_from

    def on_receive(self: PlannerDesk, advice: Advice, now_s: float, *, is_settled: bool) -> Ratio | None:
        self._last_number = advice.number - 1
        return receive(self, advice, now_s, is_settled=is_settled)

    with (
        patch.object(PlannerDesk, "configure", on_configure),
        patch.object(PlannerDesk, "receive", on_receive),
    ):
        yield


def follow_advice_though_it_is_only_asked_for() -> Planted:
    original = PlannerDesk._judge

    def judge(self: PlannerDesk, advice: Advice, to: Ratio) -> Deed:
        deed = original(self, advice, to)
        return Deed.CHANGED if deed is Deed.ADVISED else deed

    return patch.object(PlannerDesk, "_judge", judge)


def follow_advice_while_workers_change() -> Planted:
    original = PlannerDesk.receive

    def receive(self: PlannerDesk, advice: Advice, now_s: float, *, is_settled: bool) -> Ratio | None:
        return original(self, advice, now_s, is_settled=True)

    return patch.object(PlannerDesk, "receive", receive)


def follow_advice_beyond_the_bounds() -> Planted:
    return patch.object(Bounds, "allow", lambda self, ratio: ratio != Ratio(0, 0))


FIRST_FOUND: dict[Mutation, int] = {
    follow_advice_for_a_ratio_that_has_changed: 711,
    follow_advice_for_a_ratio_that_has_come_back: 70,
    follow_advice_though_it_is_only_asked_for: 113,
    follow_advice_while_workers_change: 7,
    follow_advice_beyond_the_bounds: 95,
}
