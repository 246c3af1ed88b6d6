"""A worker's own correction of the latency model, which all workers share: how much longer its steps take.

A throttled or older GPU, or a host that others use too, is known as slow after a few of its steps. The model
learns from times that are divided by the correction, so that one slow worker changes no prediction for the
others. Measurements tell only the product of the two: `LatencyModel.recentre` keeps the corrections around 1.
"""

from math import copysign, exp, log

SMOOTHING = 0.02  # weight of the newest step, once a worker has taken more than 50
MAX_SURPRISE = log(4.0)  # a single step counts as at most this much slower, or faster, than expected
MAX_CORRECTION = log(32.0)
# where workers are compared, those whose speeds differ by less count as equal: hosts that share cores with
# others differ as much from minute to minute
NOISE = log(1.5)
MEMORY_S = 120.0  # without a step, until most of what is known is forgotten


class Correction:
    """The ratio of measured and predicted times of one kind of step: the mean of its logarithm, over the
    latest steps."""

    __slots__ = ("_log", "factor", "num_steps")

    def __init__(self) -> None:
        self._log = 0.0
        self.factor = 1.0  # between 1/32 and 32
        self.num_steps = 0

    def observe(self, ratio: float) -> None:
        """Learns from a step that took `ratio` times what the model and this correction predicted."""
        weight = max(SMOOTHING, 1.0 / (self.num_steps + 2))
        self.num_steps += 1
        self._set(self._log + weight * min(max(log(ratio), -MAX_SURPRISE), MAX_SURPRISE))

    def forget(self, idle_s: float) -> None:
        """Moves towards 1: what was slow once is tried again after some minutes without a step."""
        self._set(self._log * exp(-idle_s / MEMORY_S))

    def divide(self, factor: float) -> None:
        """Takes `factor` out of the correction, for the model has taken it over."""
        self._set(self._log - log(factor))

    def _set(self, value: float) -> None:
        self._log = min(max(value, -MAX_CORRECTION), MAX_CORRECTION)
        self.factor = exp(self._log)


class WorkerSpeed:
    """A worker's corrections for prefill and decode steps. Until it has taken a step of one kind, what is
    known of the other kind counts for both."""

    __slots__ = ("decode", "prefill")

    def __init__(self) -> None:
        self.prefill = Correction()
        self.decode = Correction()

    @property
    def prefill_factor(self) -> float:
        """Returns the factor by which prefills take longer than predicted."""
        return (self.prefill if self.prefill.num_steps else self.decode).factor

    @property
    def decode_factor(self) -> float:
        """Returns the factor by which decode steps take longer than predicted."""
        return (self.decode if self.decode.num_steps else self.prefill).factor

    @property
    def decode_weight(self) -> float:
        """Returns how much more a decode step counts here where workers are compared: what of the factor is
        beyond noise."""
        value = log(self.decode_factor)
        return exp(copysign(max(0.0, abs(value) - NOISE), value))

    def forget(self, idle_s: float) -> None:
        """The worker has had nothing to compute for `idle_s`, since the last call at most."""
        self.prefill.forget(idle_s)
        self.decode.forget(idle_s)
