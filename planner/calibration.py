"""Predictions of the share of good requests beside what came, and how far the next ones are to be trusted.

How many requests come is another matter: a check compares the goodput of those that came."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ..router.planning import Check, Ratio, Summary

ERROR_WEIGHT = 0.3  # of the latest prediction
MAX_CHECKS = 20
MIN_ENDED = 30  # requests: the share of fewer says little


@dataclass
class _Prediction:
    """The share of good requests by ratio; counting begins with the first settled summary."""

    until_s: float
    attainments: Mapping[Ratio, float]
    ratio: Ratio | None = None
    from_s: float = 0.0
    num_good: int = 0
    num_ended: int = 0


class Calibration:
    """One prediction is checked at a time, over a horizon in which the ratio stays the same."""

    def __init__(self) -> None:
        self._prediction: _Prediction | None = None
        self._checks: deque[Check] = deque(maxlen=MAX_CHECKS)
        self._error = 0.0  # mean, in shares of the requests, of the latest predictions

    @property
    def trust(self) -> float:
        """Returns 1 less the mean error."""
        return 1.0 - self._error

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(self._checks)

    def predict(self, now_s: float, horizon_s: float, attainments: Mapping[Ratio, float]) -> None:
        """Has the prediction checked, unless an earlier one is still to be."""
        if self._prediction is None:
            self._prediction = _Prediction(now_s + horizon_s, attainments)

    def observe(self, summary: Summary) -> None:
        one = self._prediction
        if one is None:
            return
        if one.ratio is None:
            if summary.ratio not in one.attainments or summary.at_s >= one.until_s:
                self._prediction = None
            elif summary.is_settled:
                one.ratio, one.from_s = summary.ratio, summary.at_s
            return
        if summary.ratio != one.ratio or not summary.is_settled:
            self._prediction = None  # nothing is learnt of a ratio that did not last
            return
        one.num_good += sum(request.is_good for request in summary.seen)
        one.num_ended += len(summary.seen)
        if summary.at_s >= one.until_s:
            self._check(one, summary.at_s)

    def _check(self, one: _Prediction, now_s: float) -> None:
        assert one.ratio is not None
        self._prediction = None
        if one.num_ended < MIN_ENDED:
            return
        rate = one.num_ended / (now_s - one.from_s)
        predicted, came = rate * one.attainments[one.ratio], one.num_good / (now_s - one.from_s)
        self._checks.append(
            Check(from_s=one.from_s, until_s=now_s, ratio=one.ratio, predicted=predicted, came=came)
        )
        error = abs(predicted - came) / rate
        self._error += ERROR_WEIGHT * (error - self._error)
