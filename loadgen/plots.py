"""Pictures of results, as PNG files. matplotlib is imported when something is drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .campaign import Result
from .records import RequestRecord
from .report import LEGS, Report
from .slo import Slo


def draw_all(results: Sequence[Result], slo: Slo, folder: Path) -> list[Path]:
    """Every picture that the results have matter for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        _distributions(results, slo, folder / "latencies.png"),
        _ttft_by_prompt(results, slo, folder / "ttft.png"),
    ]
    reports = [(result.name, result.report(slo)) for result in results]
    if any(report.legs_ms for _, report in reports):
        files.append(_legs(reports, folder / "legs.png"))
    return files


def _distributions(results: Sequence[Result], slo: Slo, path: Path) -> Path:
    """The share of requests (of gaps, for ITL) that took at most a given time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = (("TTFT", slo.ttft), ("ITL", slo.itl), ("TPOT", slo.tpot), ("E2E", slo.e2e))
    for axes, (name, limit) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for result in results:
            values = np.sort([value * 1e3 for record in _ok(result) for value in _values(name, record)])
            axes.step(
                values, np.arange(1, len(values) + 1) / max(1, len(values)), where="post", label=result.name
            )
        if limit is not None:
            axes.axvline(limit, color="grey", linestyle=":", label="SLO")
        axes.set(xlabel=f"{name}, ms", ylabel="share", ylim=(0, 1), xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _ttft_by_prompt(results: Sequence[Result], slo: Slo, path: Path) -> Path:
    """A dot a request."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        points = [
            (record.num_prompt_tokens, record.ttft_s * 1e3)
            for record in _ok(result)
            if record.ttft_s is not None
        ]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], "o", alpha=0.5, markersize=4, label=result.name
        )
    if slo.ttft is not None:
        axes.axhline(slo.ttft, color="grey", linestyle=":", label="SLO")
    axes.set(xlabel="prompt tokens", ylabel="TTFT, ms", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _legs(reports: Sequence[tuple[str, Report]], path: Path) -> Path:
    """Mean legs one upon the other, up to the second token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.8 + 0.7 * len(reports)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _ in reports]
    left = np.zeros(len(reports))
    for leg in (leg for leg in LEGS if leg != "transfer"):  # most of it runs beside the prefill
        widths = np.array(
            [report.legs_ms[leg].mean if leg in report.legs_ms else 0.0 for _, report in reports]
        )
        axes.barh(names, widths, left=left, label=leg.replace("_", " "))
        left += widths
    axes.set(xlabel="ms up to the second token, means")
    figure.legend(loc="outside upper center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _ok(result: Result) -> list[RequestRecord]:
    return [record for one in result.rounds for record in one.records if record.answer is not None]


def _values(name: str, record: RequestRecord) -> Sequence[float]:
    single = {"TTFT": record.ttft_s, "TPOT": record.tpot_s, "E2E": record.e2e_s}
    if name == "ITL":
        return record.itl_s
    return () if single[name] is None else (single[name],)  # type: ignore[return-value]
