"""Decides what the head does with a planner's advice.

In: advice, and every change of the ratio or of the terms. Out: the ratio to change to, and a record.

Advice is tied to the summary that it was made from, and thereby to the ratio and the terms that it was made
for. It counts once, and only until either changes: advice that is late, repeated or out of order does
nothing."""

import enum
from collections import deque

import msgspec

from .planning import Advice, Bounds, Ratio, Terms

MAX_RECORDS = 200
HISTORY_S = 3600.0  # of the ratio, that operators see


class Mode(enum.Enum):
    OFF = "off"
    ADVISE = "advise"
    AUTO = "auto"


class Deed(enum.Enum):
    """The outcome of advice to change, or a change that an operator made."""

    CHANGED = "changed"
    ADVISED = "advised"  # nothing was done, as the mode says
    LATE = "late"  # the ratio, the terms or the workers had changed since
    REFUSED = "refused"  # the ratio is not allowed
    APPLIED = "applied"  # by an operator: `pdserve scale` or `pdserve apply`


class DeskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One event in the history of the ratio."""

    at_s: float
    made_for: Ratio
    to: Ratio
    deed: Deed
    reason: str


class PlannerState(msgspec.Struct, frozen=True, kw_only=True):
    """The planner as an operator sees it."""

    mode: Mode = Mode.OFF
    terms: Terms | None = None  # None: it is off
    advice: Advice | None = None  # the latest; None: there is none yet
    records: tuple[DeskRecord, ...] = ()  # oldest first
    num_changes: int = 0
    now_s: float = 0.0  # on the clock of all other instants

    @property
    def latest_records(self) -> tuple[DeskRecord, ...]:
        """Returns those of the last hour, oldest first."""
        return tuple(one for one in self.records if self.now_s - one.at_s <= HISTORY_S)

    @property
    def trust(self) -> float:
        return 0.0 if self.advice is None else self.advice.trust

    @property
    def predicted_goodput(self) -> float:
        """Returns the prediction for the ratio that the latest advice was made for."""
        if self.advice is None:
            return 0.0
        found = (one.goodput for one in self.advice.candidates if one.ratio == self.advice.made_for)
        return next(found, 0.0)


class PlannerDesk:
    """Knows the ratio in force, and judges advice by it."""

    def __init__(self, first_number: int = 0) -> None:
        """Summaries count from `first_number`, above those of every earlier head."""
        self.mode = Mode.OFF
        self.latest: Advice | None = None
        self.records: deque[DeskRecord] = deque(maxlen=MAX_RECORDS)
        self.num_changes = 0
        self._ratio: Ratio | None = None
        self.bounds: Bounds | None = None
        self._next_number = first_number
        self._valid_from = first_number  # earlier summaries were of another ratio, or of other terms
        self._last_number = first_number - 1  # of the latest advice

    def configure(self, mode: Mode, bounds: Bounds, ratio: Ratio) -> None:
        """The mode, the bounds and the ratio in force, after any change of a configuration."""
        self.mode, self.bounds, self._ratio = mode, bounds, ratio
        self._valid_from = self._next_number
        if mode is Mode.OFF:
            self.latest = None

    def number_summary(self) -> int:
        """Returns the number of a new summary of what is in force now."""
        self._next_number += 1
        return self._next_number - 1

    def receive(self, advice: Advice, now_s: float, *, is_settled: bool) -> Ratio | None:
        """Returns the ratio to change to; None where nothing is to be done. `is_settled`: the workers are
        those of the ratio in force, and all ready; a change would also bring back those that were drained."""
        if not self._last_number < advice.number < self._next_number or self.mode is Mode.OFF:
            return None
        self._last_number, self.latest = advice.number, advice
        if advice.to is None:
            return None
        deed = self._judge(advice, advice.to) if is_settled else Deed.LATE
        self._record(advice, advice.to, deed, advice.reason, now_s)
        if deed is not Deed.CHANGED:
            return None
        self.num_changes += 1
        return advice.to

    def applied(self, left: Ratio, to: Ratio, now_s: float) -> None:
        """An operator has changed the ratio."""
        self.records.append(
            DeskRecord(at_s=now_s, made_for=left, to=to, deed=Deed.APPLIED, reason="by an operator")
        )

    def refuse(self, reason: str, now_s: float) -> None:
        """The change that was to be made last is not possible after all."""
        record = self.records.pop()
        self.num_changes -= 1
        self.records.append(msgspec.structs.replace(record, at_s=now_s, deed=Deed.REFUSED, reason=reason))

    def _judge(self, advice: Advice, to: Ratio) -> Deed:
        if advice.number < self._valid_from or advice.made_for != self._ratio:
            return Deed.LATE
        if self.bounds is None or not self.bounds.allow(to):
            return Deed.REFUSED
        return Deed.CHANGED if self.mode is Mode.AUTO else Deed.ADVISED

    def _record(self, advice: Advice, to: Ratio, deed: Deed, reason: str, now_s: float) -> None:
        """One record stands for advice that is repeated, summary after summary."""
        last = self.records[-1] if self.records else None
        same = advice.made_for, to, Deed.ADVISED
        if last is not None and deed is Deed.ADVISED and (last.made_for, last.to, last.deed) == same:
            return
        self.records.append(DeskRecord(at_s=now_s, made_for=advice.made_for, to=to, deed=deed, reason=reason))
