"""The time breakdown of a profiled step."""

from hypothesis import given, strategies as st

from bench.gpu.kernel_table import Interval, table
from bench.gpu.report import Row


def cells(rows: list[Row]) -> list[tuple[str, str, str]]:
    return [(row.what.strip(), row.measured, row.share) for row in rows]


def test_kernels_come_by_their_time_and_the_gaps_last() -> None:
    """Two steps of 50 us, each with two kernels one after the other and a third beside the second."""
    steps = [
        Interval(name, start + begin, start + end)
        for start in (0.0, 50.0)
        for name, begin, end in (("norm", 0.0, 10.0), ("product", 15.0, 45.0), ("copy", 20.0, 25.0))
    ]
    assert cells(table("a step", steps, 2)) == [
        ("a step", "0.048 ms", ""),
        ("product", "30.0 us", "63.2%"),
        ("norm", "10.0 us", "21.1%"),
        ("copy", "5.0 us", "10.5%"),
        ("gaps between kernels", "7.5 us", "15.8%"),
    ]


def test_a_step_without_kernels_says_so() -> None:
    assert cells(table("a step", [], 1)) == [("a step", "no kernels seen", "")]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), min_size=1, max_size=40))
def test_gaps_are_the_times_without_a_kernel(runs: list[tuple[int, int]]) -> None:
    intervals = [Interval(f"k{start % 20}", float(start), float(start + length)) for start, length in runs]
    covered = {moment for start, length in runs for moment in range(start, start + length)}
    gap_us = max(covered) + 1 - min(covered) - len(covered)
    *_, gaps = table("a step", intervals, 1)
    assert gaps.measured == f"{gap_us:.1f} us"
