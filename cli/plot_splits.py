"""The picture of a comparison of splits: goodput over the rate that is offered."""

from pathlib import Path

import numpy as np

from ..planner.comparison import Comparison, Question

NUM_SPLITS, NUM_RATES = 4, 9


def draw_goodput(question: Question, compared: Comparison, path: Path) -> None:
    """Draws the best few splits into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    rates = np.linspace(0.25, 1.75, NUM_RATES) * compared.best.goodput
    for one in compared.ranked[:NUM_SPLITS]:
        trials = [question.site.try_out(one.split, question.load, rate, question.slo, 0) for rate in rates]
        axes.plot(rates, [trial.goodput for trial in trials], "o-", markersize=3, label=str(one.split))
    axes.plot(rates, rates, color="grey", linestyle=":", label="all within the objectives")
    axes.set(xlabel="requests a second, offered", ylabel=f"requests a second within {question.slo}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
