"""Reports as text, for a terminal."""

from collections.abc import Iterator, Sequence

from .compare import FigureRatio
from .report import Report
from .statistics import Distribution

_NAMES = {
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "goodput_per_s": "goodput, requests/s",
    "good_share": "share of good requests",
    "ttft_ms": "TTFT",
    "itl_ms": "ITL",
    "tpot_ms": "TPOT",
    "e2e_ms": "E2E",
}
_LEGS = {
    "queue": "queue (router)",
    "worker_queue": "queue (worker)",
    "prefill": "prefill",
    "way": "way, all the rest",
    "transfer": "transfer, in all",
    "exposed_transfer": "transfer, exposed",
    "first_decode": "first decode",
}


def report_lines(name: str, report: Report) -> Iterator[str]:
    """One target's figures."""
    failed = report.num_requests - report.num_ok
    yield f"{name}: {report.num_ok} requests ended well, {failed} failed, in {report.duration_s:.1f} s"
    for kind, number in report.errors.items():
        yield f"  {number} x {kind}"
    yield ""
    yield from _aligned(_throughput_rows(report), (0, 2))
    yield ""
    yield from _aligned([("ms", "mean", "p50", "p90", "p95", "p99", "max"), *_latency_rows(report)])
    if report.generator.warnings:
        yield ""
        yield from (f"careful: {warning}" for warning in report.generator.warnings)


def _throughput_rows(report: Report) -> list[tuple[str, ...]]:
    cached = (
        ""
        if report.num_cached_tokens is None
        else f"{report.num_cached_tokens:,} of {report.num_input_tokens:,} cached"
    )
    users = report.tokens_per_s_per_user
    slo = ", ".join(f"{name} <= {limit:g} ms" for name, limit in report.slo.items() if limit is not None)
    rows: list[tuple[str, ...]] = [
        ("requests", f"{report.requests_per_s:.2f}/s", f"{report.requests_per_min:.1f}/min"),
        ("input tokens", f"{report.input_tokens_per_s:,.1f}/s", cached),
        ("output tokens", f"{report.output_tokens_per_s:,.1f}/s", ""),
    ]
    if users is not None:
        rows.append(("tokens/s/user", f"{users.mean:.1f}", f"half have {users.p50:.1f} or more"))
    if slo:
        rows.append(
            ("goodput", f"{report.goodput_per_s:.2f}/s", f"{report.good_share:.0%} of requests with {slo}")
        )
    return rows


def _latency_rows(report: Report) -> Iterator[tuple[str, ...]]:
    for field in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        yield from _summary_row(_NAMES[field], getattr(report, field))
    for bucket in report.ttft_by_prompt_tokens:
        yield from _summary_row(f"TTFT, {bucket.low}-{bucket.high - 1} tokens", bucket.ttft_ms)
    for leg, summary in report.legs_ms.items():
        yield from _summary_row(f"  {_LEGS[leg]}", summary)
    yield from _summary_row("sent late", report.generator.lateness_ms)


def _summary_row(name: str, summary: Distribution | None) -> Iterator[tuple[str, ...]]:
    if summary is not None:
        values = (summary.mean, summary.p50, summary.p90, summary.p95, summary.p99, summary.max)
        yield (name, *map(_number, values))


def ratio_lines(first: str, second: str, ratios: Sequence[FigureRatio]) -> Iterator[str]:
    """Two targets side by side: means over rounds, the ratio and its interval."""
    rows: list[tuple[str, ...]] = [("", first, second, f"{second} / {first}", "95 %")]
    for ratio in ratios:
        field, _, statistic = ratio.figure.partition(".")
        name = _NAMES[field] + (f" {statistic}, ms" if statistic else "")
        value = "-" if ratio.ratio is None else f"{ratio.ratio:.3f}"
        interval = "-" if ratio.low is None or ratio.high is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
        rows.append((name, _number(ratio.first), _number(ratio.second), value, interval))
    yield from _aligned(rows, (0, 4))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _aligned(rows: Sequence[tuple[str, ...]], to_the_left: Sequence[int] = (0,)) -> Iterator[str]:
    """Columns as wide as their widest cell, to the right but for those named."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column in to_the_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
