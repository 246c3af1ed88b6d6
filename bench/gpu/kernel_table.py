"""The breakdown of steps' time: kernels by their share, and the time without a kernel."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .report import Row

_MAX_KERNELS = 14
_MAX_NAME = 44


@dataclass(frozen=True)
class Interval:
    """One run of a kernel, on any stream."""

    name: str
    start_us: float
    end_us: float


def table(title: str, intervals: Sequence[Interval], num_steps: int) -> list[Row]:
    """One step, then its kernels, the longest first, then the gaps; shares are of the time from the first
    kernel to the last.

    Where kernels run side by side, they have more than all of it together.
    """
    if not intervals:
        return [Row(title, "no kernels seen")]
    whole_us = max(each.end_us for each in intervals) - min(each.start_us for each in intervals)
    gaps_us = _gaps_us(intervals)
    by_name: dict[str, list[float]] = defaultdict(list)
    for each in intervals:
        by_name[_short(each.name)].append(each.end_us - each.start_us)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    rows = [_row(name, times_us, whole_us, num_steps) for name, times_us in longest[:_MAX_KERNELS]]
    others_us = [time_us for _, times_us in longest[_MAX_KERNELS:] for time_us in times_us]
    if others_us:
        rows.append(_row(f"{len(longest) - _MAX_KERNELS} other kernels", others_us, whole_us, num_steps))
    rows.append(_row("gaps between kernels", gaps_us, whole_us, num_steps))
    return [
        Row(title, f"{whole_us / num_steps / 1e3:.3f} ms", "", f"{len(intervals) / num_steps:g} kernels"),
        *rows,
    ]


def _row(name: str, times_us: Sequence[float], whole_us: float, num_steps: int) -> Row:
    longest_us = f", the longest {max(times_us):.1f} us" if times_us else ""
    return Row(
        f"  {name}",
        f"{sum(times_us) / num_steps:.1f} us",
        f"{sum(times_us) / whole_us:.1%}",
        f"{len(times_us) / num_steps:g} a step{longest_us}",
    )


def _gaps_us(intervals: Iterable[Interval]) -> list[float]:
    """The lengths of the gaps without a kernel."""
    gaps: list[float] = []
    busy_until_us: float | None = None
    for each in sorted(intervals, key=lambda interval: interval.start_us):
        if busy_until_us is not None and each.start_us > busy_until_us:
            gaps.append(each.start_us - busy_until_us)
        busy_until_us = max(busy_until_us or each.end_us, each.end_us)
    return gaps


def _short(name: str) -> str:
    """Shortens a name but keeps both ends, as C++ kernels differ in their last arguments."""
    name = name.removeprefix("void ").replace("at::native::", "")
    if len(name) <= _MAX_NAME:
        return name
    half = (_MAX_NAME - 3) // 2
    return f"{name[:half]}...{name[-half:]}"
