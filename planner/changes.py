"""A change of ratio: which instances flip, start and stop, and when those that start serve."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.messages import Role
from ..router.planning import Ratio, Summary

FLIP_S = 1.0  # an upper bound: a flip takes less


@dataclass(frozen=True)
class Change:
    """The steps from one ratio to another: flips first, which keep caches and load nothing."""

    num_to_decode: int  # instances that flip from prefill to decode; negative: the other way
    starts: Mapping[Role, int]
    stops: Mapping[Role, int]

    @classmethod
    def between(cls, present: Ratio, wanted: Ratio, *, can_flip: bool) -> "Change":
        more = {role: wanted.sizes[role] - size for role, size in present.sizes.items()}
        num_to_decode = 0
        if can_flip and more[Role.PREFILL] * more[Role.DECODE] < 0:
            num_flips = min(map(abs, more.values()))
            num_to_decode = num_flips if more[Role.DECODE] > 0 else -num_flips
        more[Role.PREFILL] += num_to_decode
        more[Role.DECODE] -= num_to_decode
        starts = {role: max(0, count) for role, count in more.items()}
        stops = {role: max(0, -count) for role, count in more.items()}
        return cls(num_to_decode, starts, stops)

    @property
    def num_steps(self) -> int:
        return abs(self.num_to_decode) + sum(self.starts.values()) + sum(self.stops.values())

    def delay_s(self, summary: Summary, drain_s: float) -> float:
        """Returns the seconds until instances that start serve; `drain_s` is how long the streams of an
        instance take to end."""
        num_then = summary.ratio.num_instances + sum(self.starts.values())
        # a place is free only once an instance that gives it up has drained
        is_full = num_then > summary.terms.bounds.max_instances
        return summary.start_s + (drain_s if is_full else 0.0)
