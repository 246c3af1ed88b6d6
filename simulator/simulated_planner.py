"""A planner process in virtual time that gives any advice: sensible, beyond the bounds, late, twice, or none
any more. The head's part of it is production's `PlannerDesk`.

Checks, by its own account, that the head follows only advice that is fresh, allowed and new."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from ..router.fleet import Fleet
from ..router.planner_desk import Mode, PlannerDesk
from ..router.planning import Advice, Bounds, Ratio, Window
from .virtual_time import VirtualTime

SUMMARIES_S = 0.1  # between two summaries
AGAIN_S = 1.0  # until another process has started
WRONG_ROLE = Ratio(9, 0)  # never allowed


@dataclass(frozen=True)
class PlannedPlanner:
    """The planner of a scenario: its mode, and what it may choose from."""

    mode: Mode
    bounds: Bounds


class PlannedHead(Protocol):
    """The present head's part."""

    desk: PlannerDesk
    fleet: Fleet

    @property
    def is_awake(self) -> bool:
        """Whether it is alive and not frozen."""
        ...


class SimulatedPlanner:
    """Lives until `stop`; its process dies now and then."""

    def __init__(
        self,
        time: VirtualTime,
        rng: Random,
        plan: PlannedPlanner,
        head: Callable[[], PlannedHead],
        resize: Callable[[Ratio], None],
        violation: Callable[[str], None],
    ) -> None:
        self._time = time
        self._rng = rng
        self._plan = plan
        self._allowed = tuple(plan.bounds.ratios())
        self._head = head
        self._resize = resize
        self._violation = violation
        self._is_stopped = False
        self._dead_until_s = 0.0
        self._ratio = Ratio(0, 0)  # in force
        self._fresh: set[int] = set()  # numbers of summaries since the last change
        self.num_followed = 0

    def start(self) -> None:
        self._time.call_later(SUMMARIES_S, self._sum_up)

    def stop(self) -> None:
        self._is_stopped = True

    def configure(self, ratio: Ratio) -> None:
        """The head has, or a new head begins with, another ratio."""
        self._ratio = ratio
        self._fresh.clear()
        self._head().desk.configure(self._plan.mode, self._plan.bounds, ratio)

    def _sum_up(self) -> None:
        if self._is_stopped:
            return
        self._time.call_later(SUMMARIES_S, self._sum_up)
        head = self._head()
        if not head.is_awake:
            return
        number = head.desk.number_summary()
        self._fresh.add(number)
        if self._time.now_s < self._dead_until_s:
            return
        if self._rng.random() < 0.05:
            self._dead_until_s = self._time.now_s + AGAIN_S
            return
        advice = self._decide(number)
        self._send(advice)
        if self._rng.random() < 0.3:
            self._send(advice)

    def _decide(self, number: int) -> Advice:
        draw = self._rng.random()
        to: Ratio | None = None
        if draw < 0.1:
            to = WRONG_ROLE
        elif draw < 0.5:
            others = [one for one in self._allowed if one != self._ratio]
            flips = [one for one in others if one.num_instances == self._ratio.num_instances]
            to = self._rng.choice(flips if flips and draw < 0.4 else others)
        return Advice(
            number=number,
            at_s=self._time.now_s,
            made_for=self._ratio,
            to=to,
            reason="drawn",
            window=Window(),
        )

    def _send(self, advice: Advice) -> None:
        self._time.call_later(self._rng.choice((0.01, 0.05, 0.5, 2.0)), lambda: self._arrive(advice))

    def _arrive(self, advice: Advice) -> None:
        head = self._head()
        if self._is_stopped or not head.is_awake:
            return
        to = head.desk.receive(advice, self._time.now_s, is_settled=head.fleet.is_reconciled)
        if to is None:
            return
        if self._plan.mode is not Mode.AUTO:
            self._violation(f"a planner that is to {self._plan.mode.value} changes the ratio to {to}")
        if not head.fleet.is_reconciled:
            self._violation(f"advice {advice.number} is followed while the workers change")
        if advice.number not in self._fresh or advice.made_for != self._ratio:
            self._violation(f"advice {advice.number} for {advice.made_for} is followed at {self._ratio}")
        if to not in self._allowed:
            self._violation(f"the planner changes the ratio to {to}, which is not allowed")
            return
        self.num_followed += 1
        self._resize(to)
