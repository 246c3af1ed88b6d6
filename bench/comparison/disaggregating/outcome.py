"""The results of the sweep: a table and curves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from pdserve.loadgen.compare import FigureRatio
from pdserve.loadgen.report import Report
from pdserve.loadgen.slo import Slo
from pdserve.loadgen.statistics import Distribution

_HEAD = (
    f"{'case':<14} {'rate/s':>6}  {'way':<12} {'goodput/s':>9} {'good':>5} {'req/s':>6} {'out tok/s':>9} "
    f" {'TTFT p50':>8} {'p90':>6} {'p99':>6}  {'TPOT p50':>8} {'p90':>5}  {'ITL p50':>7} {'p99':>5}"
    f" {'failed':>6}"
)
_RATIOS = ("goodput_per_s", "ttft_ms.p50", "ttft_ms.p90", "tpot_ms.p50", "itl_ms.p99", "e2e_ms.p50")


@dataclass(frozen=True)
class Point:
    """One case at one rate, both ways; ratios are those of disaggregated over colocated."""

    case: str
    rate: float
    reports: dict[str, Report]
    ratios: tuple[FigureRatio, ...]


def table(points: Sequence[Point]) -> Iterator[str]:
    """Latencies in ms."""
    yield _HEAD
    for point in points:
        for way, report in point.reports.items():
            yield _row(point, way, report)
    yield ""
    yield "disaggregated over colocated, with 95 % intervals by bootstrap over rounds:"
    yield f"{'case':<14} {'rate/s':>6}  " + " ".join(f"{name:>22}" for name in _RATIOS)
    for point in points:
        ratios = {ratio.figure: ratio for ratio in point.ratios}
        yield f"{point.case:<14} {point.rate:>6g}  " + " ".join(
            f"{_ratio(ratios.get(name)):>22}" for name in _RATIOS
        )
    warnings = {
        warning
        for point in points
        for report in point.reports.values()
        for warning in report.generator.warnings
    }
    cached = sum(report.num_cached_tokens or 0 for point in points for report in point.reports.values())
    prompts = sum(report.num_input_tokens for point in points for report in point.reports.values())
    if cached > 0.001 * prompts:
        warnings.add(f"{cached:,} of {prompts:,} prompt tokens were in a prefix cache")
    yield from (f"careful: {warning}" for warning in sorted(warnings))


def _row(point: Point, way: str, report: Report) -> str:
    ttft, tpot, itl = report.ttft_ms, report.tpot_ms, report.itl_ms
    return (
        f"{point.case:<14} {point.rate:>6g}  {way:<12} {report.goodput_per_s:>9.2f} {report.good_share:>5.0%}"
        f" {report.requests_per_s:>6.2f} {report.output_tokens_per_s:>9.1f}  {_of(ttft, 'p50'):>8}"
        f" {_of(ttft, 'p90'):>6} {_of(ttft, 'p99'):>6}  {_of(tpot, 'p50'):>8} {_of(tpot, 'p90'):>5} "
        f" {_of(itl, 'p50'):>7} {_of(itl, 'p99'):>5} {report.num_requests - report.num_ok:>6}"
    )


def _of(summary: Distribution | None, statistic: str) -> str:
    return "-" if summary is None else f"{getattr(summary, statistic):.0f}"


def _ratio(ratio: FigureRatio | None) -> str:
    if ratio is None or ratio.ratio is None:
        return "-"
    interval = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.ratio:.2f}{interval}"


def draw(points: Sequence[Point], slo: Slo, path: Path) -> None:
    """A row for each case: TTFT, TPOT, ITL and goodput over the rate."""
    cases = [(name, list(group)) for name, group in groupby(points, lambda point: point.case)]
    figure = Figure(figsize=(18, 4.2 * len(cases)), layout="constrained")
    for row, (name, group) in zip(figure.subplots(len(cases), 4, squeeze=False), cases, strict=True):
        panels = (
            ("ttft_ms", ("p50", "p90"), slo.ttft),
            ("tpot_ms", ("p50", "p90"), slo.tpot),
            ("itl_ms", ("p50", "p99"), slo.itl),
        )
        for axes, (field, statistics, limit) in zip(row, panels, strict=False):
            for color, way in enumerate(group[0].reports):
                for statistic, style in zip(statistics, ("-", "--"), strict=True):
                    summaries = [getattr(point.reports[way], field) for point in group]
                    values = [
                        None if summary is None else getattr(summary, statistic) for summary in summaries
                    ]
                    rates = [point.rate for point in group]
                    axes.plot(rates, values, style, marker="o", color=f"C{color}", label=f"{way} {statistic}")
            if limit is not None:
                axes.axhline(limit, color="grey", linestyle=":", label="SLO")
            axes.set(
                title=f"{name}: {field[:-3].upper()}", xlabel="offered requests/s", ylabel="ms", yscale="log"
            )
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small", framealpha=0.4)
        _draw_goodput(row[3], name, group)
    figure.savefig(path, dpi=110)


def _draw_goodput(axes: object, name: str, group: Sequence[Point]) -> None:
    rates = [point.rate for point in group]
    for color, way in enumerate(group[0].reports):
        goodputs = [point.reports[way].goodput_per_s for point in group]
        axes.plot(rates, goodputs, "-", marker="o", color=f"C{color}", label=way)  # type: ignore[attr-defined]
    axes.plot(rates, rates, color="grey", linestyle=":", label="offered")  # type: ignore[attr-defined]
    axes.set(title=f"{name}: goodput", xlabel="offered requests/s", ylabel="requests/s")  # type: ignore[attr-defined]
    axes.grid(alpha=0.3)  # type: ignore[attr-defined]
    axes.legend(fontsize="small")  # type: ignore[attr-defined]
