"""The sweep's table and curves report every measurement, misses and doubtful ones included."""

from dataclasses import replace
from pathlib import Path

from bench.comparison.disaggregating.outcome import Point, draw, table
from pdserve.loadgen.compare import compare
from pdserve.loadgen.report import Report, make_report
from pdserve.loadgen.slo import Slo
from tests.loadgen.support import one_round, record

SLO = Slo(ttft=500, tpot=20)


def point(case: str, rate: float, ttft_s: float) -> Point:
    slow, fast = ([one_round(record(at_s=(first_s, first_s + 0.01)))] * 2 for first_s in (ttft_s, 0.1))
    reports: dict[str, Report] = {"1P1D": make_report(slow, SLO), "2 colocated": make_report(fast, SLO)}
    return Point(case, rate, reports, tuple(compare(fast, slow, SLO)))


def test_each_way_has_a_row_and_each_point_its_ratios() -> None:
    lines = list(table([point("even", 1.0, 0.2), point("even", 2.0, 0.6)]))
    of_points = [line for line in lines if line.startswith("even")]
    rows = [line.split() for line in of_points]
    assert [row[:3] for row in rows[:4]] == [
        ["even", "1", "1P1D"], ["even", "1", "2"], ["even", "2", "1P1D"], ["even", "2", "2"],
    ]  # fmt: skip
    assert rows[2][3:5] == ["0.00", "0%"]
    assert "2.00 (2.00 to 2.00)" in of_points[4]
    assert "6.00 (6.00 to 6.00)" in of_points[5]
    assert not any(line.startswith("careful") for line in lines)


def test_prefix_cache_hits_are_reported() -> None:
    one = point("even", 1.0, 0.2)
    cached = {way: replace(report, num_cached_tokens=10) for way, report in one.reports.items()}
    assert (
        list(table([replace(one, reports=cached)]))[-1]
        == "careful: 20 of 40 prompt tokens were in a prefix cache"
    )


def test_curves_are_drawn_for_every_case(tmp_path: Path) -> None:
    draw(
        [point("even", 1.0, 0.2), point("even", 2.0, 0.6), point("other", 1.0, 0.3)],
        SLO,
        tmp_path / "curves.png",
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
